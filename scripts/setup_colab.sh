#!/usr/bin/env bash
# flux-fill-serve on Google Colab, or on any Linux machine without containers: a Python of its own, the torch that the
# driver can run, the variant that fits the GPU, the app in the background. Run again, it does only what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
scripts/setup_colab.sh            install, start, wait until the app is ready
scripts/setup_colab.sh --dry-run  print what it would choose
scripts/setup_colab.sh --stop     stop the app

HF_TOKEN           for a GPU's variants: FLUX.1-Fill-dev is a gated repository
FLUXFILL_FOLDER    environment, config, log, photos and jobs (var/colab)
FLUXFILL_WEIGHTS   weights, about 20 GB; a folder of Google Drive outlives the machine (FLUXFILL_FOLDER/weights)
FLUXFILL_PORT      8000; the embedded Pub/Sub server listens 85 above
END
}

say() { echo "$*"; }
fail() {
  echo "$*" >&2
  exit 1
}
# Whether the first version is the second one, or later.
at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

folder=$(realpath -m "${FLUXFILL_FOLDER:-var/colab}")
weights=$(realpath -m "${FLUXFILL_WEIGHTS:-$folder/weights}")
port=${FLUXFILL_PORT:-8000}
url=http://127.0.0.1:$port
python=$folder/venv/bin/python config=$folder/serve_config.yaml log=$folder/serve.log

# -- what to install and to serve

choose() {
  gpu='none' variant=telea backend=cpu encoder='{downscale_delay_s: 60}' min_replicas=1 timeout_s=240
  host_gib=$(($(getconf _PHYS_PAGES) * $(getconf PAGESIZE) >> 30))
  command -v nvidia-smi >/dev/null || return 0
  local query=name,memory.total,compute_cap,driver_version found
  # Where it fails, there is no GPU for it.
  found=$(nvidia-smi --query-gpu=$query --format=csv,noheader,nounits 2>/dev/null) || return 0
  IFS=, read -r gpu mib capability driver <<<"${found%%$'\n'*}"
  mib=${mib// /} capability=${capability// /} driver=${driver// /}
  # Resident without text encoders: 11.0 GiB of Q4_0, 16.9 of Q8_0.
  if [ "$mib" -lt 14000 ]; then return; fi
  variant=Q4_0
  if [ "$mib" -ge 20000 ]; then variant=Q8_0; fi
  choose_backend
  # T5 takes 10 GB of host memory beside the replicas. A Colab T4 has 12 in all: there T5 and the painter take turns on
  # the GPU, and each goes before the other can come.
  if [ "$host_gib" -lt 24 ]; then encoder='{num_gpus: 1, downscale_delay_s: 2}' min_replicas=0; fi
  # A GPU without bfloat16 computes FLUX.1 in float32: minutes for a photo.
  if ! at_least "$capability" 8.0; then timeout_s=1200; fi
}

# torch 2.13 is built for CUDA 13.0, which wants driver 580 and compute capability 7.5, and for 12.6, which wants driver
# 525.60.13 and knows no Blackwell (10.0).
choose_backend() {
  backend=cu130
  if at_least "$driver" 580 && at_least "$capability" 7.5; then return; fi
  backend=cu126
  at_least "$driver" 525.60.13 || fail "The driver is $driver, and torch 2.13 needs 525.60.13 or later."
  ! at_least "$capability" 10.0 || fail "The driver is $driver, and $gpu needs 580 or later."
}

show() {
  say "GPU       $gpu${mib:+, $mib MiB, compute capability $capability, driver $driver}"
  say "machine   $(nproc) CPUs, $host_gib GiB, of /dev/shm $(df -h --output=size /dev/shm | tail -n 1 | xargs)"
  say "Python    3.11"
  say "torch     2.13 for $backend"
  say "variant   $variant"
  say "encoder   $encoder"
  say "address   $url"
}

write_config() {
  local served="$variant: {min_replicas: $min_replicas, downscale_delay_s: 30}"
  local generators='fake: {num_cpus: 0.1}'
  if [ "$variant" = telea ]; then
    served+=$'\n        tiny-Q4_0: {downscale_delay_s: 60}' generators+=$'\n        tiny-sdxl: {downscale_delay_s: 60}'
  fi
  cat >"$config" <<END
# Of scripts/setup_colab.sh, for this GPU: $gpu. Once written it is kept.
proxy_location: HeadOnly
http_options: {host: 127.0.0.1, port: $port}
applications:
  - name: fluxfill
    route_prefix: /
    import_path: deployments.app:build
    autoscaling_policy: {policy_function: deployments.scaling:Policy}
    args:
      blobs: files:$folder/blobs
      jobs: sqlite:$folder/jobs.db
      public_url: $url
      messages: {url: "embedded://127.0.0.1:$((port + 85))", completion_topic: session-completed}
      weights: {cache: "$weights", lock: "$weights/weights.lock.json"}
      work: {inference_timeout_s: $timeout_s}
      variants:
        $served
      generators:
        $generators
      text_encoder: $encoder
    deployments:
      - {name: Ingress, user_config: {variant: $variant}}
END
}

install() {
  local wanted
  wanted="$backend $(cat pyproject.toml constraints.txt | sha256sum)"
  if [ "$(cat "$folder/installed" 2>/dev/null)" = "$wanted" ]; then return; fi
  say "Installing; the first time takes minutes."
  command -v uv >/dev/null || python3 -m pip install --quiet uv
  [ -x "$python" ] || uv venv --quiet --python 3.11 --managed-python "$folder/venv"
  # The pins name torch's build for CPUs.
  sed 's/^\(torch==[0-9.]*\)+.*/\1/' constraints.txt >"$folder/constraints.txt"
  uv pip install --quiet --python "$python" --torch-backend "$backend" -c "$folder/constraints.txt" -e '.[diffusion]'
  if [ "$backend" != cpu ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
      fail "torch for $backend sees no CUDA, though there is a GPU: $gpu, driver $driver. A new runtime may help."
  fi
  echo "$wanted" >"$folder/installed"
}

# -- the app

# Its process, if it runs. By then a number may be another's, whose command line has no such config.
pid() {
  local number
  number=$(cat "$folder/serve.pid" 2>/dev/null) || return
  tr '\0' ' ' 2>/dev/null <"/proc/$number/cmdline" | grep -qF " $config " || return
  echo "$number"
}

get_ready() { curl -s "$@" --noproxy '*' --max-time 5 "$url/ready"; }

start() {
  if get_ready >/dev/null; then fail "Another program answers at $url: stop it, or set FLUXFILL_PORT."; fi
  export RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 OMP_WAIT_POLICY=PASSIVE
  # Ray would take a third of the memory for its objects; they are photos in flight.
  export RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=500000000
  # Only SIGINT ends `serve run` in order, and what a script starts in the background ignores it unless told otherwise.
  setsid env --default-signal=INT "$folder/venv/bin/serve" run "$config" >"$log" 2>&1 </dev/null &
  app=$!
  echo "$app" >"$folder/serve.pid"
}

wait_ready() {
  local told=$SECONDS end=$((SECONDS + 3600))
  until get_ready -f >/dev/null; do
    kill -0 "$app" 2>/dev/null || fail "The app ended. The end of $log:"$'\n'"$(tail -n 20 "$log")"
    ((SECONDS < end)) || fail "It is not ready after an hour: $(get_ready)"
    if ((SECONDS >= told + 30)); then
      told=$SECONDS
      say "Not ready yet; see tail -f $log"
    fi
    sleep 0.2
  done
}

stop() {
  local number
  if ! number=$(pid); then
    say "The app does not run."
    return
  fi
  kill -INT "$number"
  local end=$((SECONDS + 120))
  while pid >/dev/null; do
    if ((SECONDS >= end)); then
      kill -KILL -- "-$number"
      say "Killed, because it did not stop in 120 s: the next start goes on with its jobs."
      return
    fi
    sleep 0.2
  done
  say "Stopped."
}

# --

case ${1:-} in
  --dry-run)
    choose
    show
    exit
    ;;
  --stop)
    stop
    exit
    ;;
  ?*)
    usage
    exit 2
    ;;
esac
umask 077
mkdir -p "$folder" "$weights"
if ! app=$(pid); then
  choose
  show
  if [ "$variant" != telea ] && [ -z "${HF_TOKEN:-}" ] && [ -z "$(ls "$weights")" ]; then
    fail "$variant needs HF_TOKEN, of a user who has accepted the licence of FLUX.1-Fill-dev."
  fi
  install
  if [ -e "$config" ]; then say "Keeping $config; delete it to have another written."; else write_config; fi
  start
fi
wait_ready
say "Ready: $url/ready"
say "Edit:  $folder/venv/bin/fluxfill submit -c $config --original photo.jpg --mask mask.png"
say "Log:   $log"
say "Stop:  scripts/setup_colab.sh --stop"

#!/bin/bash
# Builds the image and tries it: as uid 10001 on a read-only root, without capabilities and without a network.
#   scripts/image_test.sh          builds it without an engine or a registry (Debian 12, as root or with sudo), tries it
#   scripts/image_test.sh IMAGE    tries this image with $ENGINE: podman, or docker
# Logs and the bill of materials go into out/image.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-}
engine=${ENGINE:-podman}
logs=$PWD/out/image
if [ -z "$image" ] && [ "$(id -u)" != 0 ]; then
  exec sudo -n --preserve-env=PIP_FIND_LINKS bash "$PWD/scripts/image_test.sh"
fi
rm -rf "$logs"
mkdir -p "$logs"

step() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }

fail() {
  printf '[%3d s] FAILED: %s; see %s\n' "$SECONDS" "$*" "$logs" >&2
  exit 1
}

# A folder of pip's that has torch's CPU wheel; elsewhere uv finds torch's own index.
wheels() {
  local folder
  for folder in ${PIP_FIND_LINKS:-} $(python3 -m pip config get global.find-links 2>/dev/null); do
    if compgen -G "$folder/torch-*+cpu-cp311-*.whl" >/dev/null; then
      echo "$folder"
      return
    fi
  done
}

build() {
  local ca=/etc/ssl/certs/ca-certificates.crt base=localhost/python:3.11-bookworm options=() packages=() folder name
  export DEBIAN_FRONTEND=noninteractive
  for name in buildah podman runc mmdebstrap netavark aardvark-dns iptables catatonit; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || packages+=("$name")
  done
  if [ ${#packages[@]} -gt 0 ]; then
    step "installing ${packages[*]}"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >"$logs/apt.log" 2>&1 || fail "apt-get install"
  fi
  if ! podman image exists "$base"; then
    step "making a base image of Debian's packages"
    mmdebstrap --variant=minbase --include=ca-certificates,python3.11,python3.11-venv \
      --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
      --dpkgopt='path-exclude=/usr/share/locale/*' \
      bookworm "$logs/base.tar" >"$logs/base.log" 2>&1 || fail "mmdebstrap"
    podman import --quiet "$logs/base.tar" "$base" >/dev/null
    rm "$logs/base.tar"
  fi
  folder=$(wheels)
  [ -z "$folder" ] || options+=(-v "$folder:/wheels:ro" --build-arg UV_FIND_LINKS=/wheels)
  # This machine's certificates: a network may have one of its own.
  [ ! -e "$ca" ] || options+=(-v "$ca:$ca:ro")
  step "building"
  # No daemon and no privileges: RUN steps in a chroot, on this machine's network.
  buildah bud --isolation chroot --pull-never --network host --format docker "${options[@]}" \
    --build-arg "BASE=$base" --build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD)" \
    -t "$1" . >"$logs/build.log" 2>&1 || fail "buildah bud: $(tail -n 3 "$logs/build.log")"
}

# A container on a read-only root, without a network; options, then the image and its command.
start() {
  local name=$1
  shift
  containers+=("$name")
  "$engine" run -d --name "$name" --read-only --tmpfs /tmp:rw,size=4g,mode=1777 --shm-size 1g --cap-drop ALL \
    --security-opt no-new-privileges "$@" >/dev/null 2>>"$logs/engine.log"
}

end() {
  local name
  for name in "${containers[@]}"; do
    "$engine" logs "$name" >"$logs/$name.log" 2>&1 || true
    "$engine" rm -f "$name" >/dev/null 2>&1 || true
  done
}

# Waits up to $1 seconds for a command to succeed.
await() {
  local until=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $until ] || return 1
    sleep 1
  done
}

healthy() {
  case $engine in
    podman) podman healthcheck run "$1" ;;
    *) [ "$("$engine" inspect -f '{{.State.Health.Status}}' "$1")" = healthy ] ;;
  esac
}

# Stops a container and checks its exit status: name, seconds of grace, status.
stop() {
  local began=$SECONDS status
  "$engine" stop -t "$2" "$1" >/dev/null 2>>"$logs/engine.log"
  status=$("$engine" inspect -f '{{.State.ExitCode}}' "$1")
  [ "$status" = "$3" ] || fail "$1 ended with $status after SIGTERM, not $3"
  step "$1: stopped $((SECONDS - began)) s after SIGTERM, status $status"
}

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
if [ -z "$image" ]; then
  # runc, because crun fails where the host's limits cannot be raised; limits that it lets a container have.
  cat >"$logs/containers.conf" <<-'CONF'
	[containers]
	default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
	[engine]
	runtime = "runc"
	cgroup_manager = "cgroupfs"
	events_logger = "file"
	[network]
	network_backend = "netavark"
	CONF
  export CONTAINERS_CONF=$logs/containers.conf
  image=localhost/flux-fill-serve:$version
  build "$image"
fi
containers=()
trap end EXIT
app=fluxfill-$$-app head=fluxfill-$$-head

step "$image: $("$engine" image inspect -f '{{.Size}}' "$image" | awk '{ printf "%.0f MB", $1 / 1e6 }')"
"$engine" history --format '{{.Size}}  {{.CreatedBy}}' "$image" | cut -c 1-100 >"$logs/layers.txt"
"$engine" run --rm --no-healthcheck --network none "$image" cat sbom.cdx.json >"$logs/sbom.cdx.json"

step "starting it"
began=$SECONDS
start "$app" --network none --memory 8g -e "API_KEYS=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')" "$image"
await 180 healthy "$app" || fail "the app is not ready"
step "ready after $((SECONDS - began)) s"

step "editing a photo"
"$engine" exec "$app" python -c 'from pathlib import Path; from deployments.cli.demo import draw_leash; draw_leash(Path("/tmp/cat"))'
for variant in telea tiny-Q4_0; do
  "$engine" exec "$app" fluxfill submit --original /tmp/cat/original.jpg --mask /tmp/cat/mask.png --out "/tmp/$variant" \
    --variant "$variant" --steps 4 >"$logs/submit-$variant.log" 2>&1 || fail "fluxfill submit --variant $variant"
done
"$engine" exec -i "$app" python - <scripts/image_inside.py || fail "the image is not as it should be"

step "stopping it while it works"
"$engine" exec -d "$app" fluxfill submit --original /tmp/cat/original.jpg --mask /tmp/cat/mask.png --out /tmp/late \
  --variant tiny-Q4_0 --steps 100 --crop original >/dev/null
await 60 bash -c "'$engine' exec '$app' fluxfill jobs --status running | grep -q running" || fail "no job runs"
# The ingress's, and what Serve itself takes.
stop "$app" 120 0
"$engine" logs "$app" >"$logs/app.log" 2>&1
for action in stopping requeued; do
  grep -q "\"action\": \"$action\"" "$logs/app.log" || fail "the log has no line of the action $action"
done
step "its unfinished job was requeued"

# As KubeRay starts a head, and as its init container waits for it: with 256 MiB and a fifth of a CPU.
step "starting a head as KubeRay does"
token=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
start "$head" --no-healthcheck --network none --memory 4g -e "RAY_AUTH_TOKEN=$token" -e RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=5 \
  "$image" /bin/bash -c -- \
  "ulimit -n 65536; ray start --head --num-cpus=0 --dashboard-host=0.0.0.0 --metrics-export-port=8080 --block"
# shellcheck disable=SC2016 # expanded in the container
"$engine" run --rm --no-healthcheck --network "container:$head" --read-only --tmpfs /tmp --cap-drop ALL \
  --security-opt no-new-privileges --memory 256m --memory-swap 256m --cpus 0.2 -e "RAY_AUTH_TOKEN=$token" "$image" \
  /bin/bash -c -- 'for _ in {1..20}; do
    SECONDS=0
    ray health-check --address 127.0.0.1:6379 && echo "ray health-check took $SECONDS s" && exit
    sleep 1
  done; exit 1' >"$logs/health-check.log" 2>&1 || fail "ray health-check"
step "$(tail -n 1 "$logs/health-check.log") with 256 MiB and 0.2 CPUs"
for probe in 52365/api/local_raylet_healthz 8265/api/gcs_healthz; do
  await 30 "$engine" exec "$head" bash -c "wget --tries 1 -T 2 -q -O- http://localhost:$probe | grep success" || fail "probe $probe"
done
"$engine" exec "$head" bash -lc 'command -v python' | grep -q ^/opt/app/ || fail "a login shell has another Python"
step "KubeRay's probes succeed"
stop "$head" 60 1
step "ok"

#!/usr/bin/env bash
# What this machine has of all that the service can use: `make inspect-env`. Reads, changes nothing, always exits 0.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 0

bold='' plain=''
[ -t 1 ] && bold=$'\e[1m' plain=$'\e[0m'

section() { printf '\n%s%s%s\n' "$bold" "$1" "$plain"; }

# A name and what was found, in aligned lines.
row() {
  local name=$1 line
  while IFS= read -r line; do
    printf '  %-26s %s\n' "$name" "$line"
    name=''
  done <<<"${2:-not found}"
}

# A command that may be missing, or ask a daemon or a driver that hangs.
ask() { timeout 60 "$@" 2>/dev/null; }

info() { ask docker info --format "$1"; }
gpu() { ask nvidia-smi --query-gpu="$1" --format=csv,noheader; }
python=$(ls .venv/bin/python 2>/dev/null || command -v python3.11 || command -v python3)
version() { ask "$python" -c "import importlib.metadata as m; print(m.version('$1'))"; }

section Machine
row OS "$(sed -n 's/^PRETTY_NAME="\(.*\)"$/\1/p' /etc/os-release)"
row kernel "$(uname -sr)"
row CPUs "$(nproc) of $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
# What decides how fast torch computes on a CPU: without one of the last two it emulates bfloat16.
row 'CPU flags' "$(grep -m1 ^flags /proc/cpuinfo | grep -owE 'avx2|avx512f|avx512_vnni|avx512_bf16|amx_bf16' | paste -sd ' ')"
row memory "$(awk '/^Mem(Total|Available)/ { printf "%s %.1f GiB  ", $1, $2 / 2^20 }' /proc/meminfo)"
row /dev/shm "$(df -h --output=size,avail /dev/shm | awk 'NR == 2 { print $1 ", " $2 " available" }')"
row groups "$(id -nG)"

section Containers
row 'Docker client' "$(ask docker version --format '{{.Client.Version}}' | head -n 1)"
row 'Docker engine' "$(info '{{.ServerVersion}}')"
# shellcheck disable=SC2016  # Go's variables
row runtimes "$(info '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}')"
# Says nothing while the engine's CDI feature is off.
row "engine's CDI" "$(info '{{with .CDISpecDirs}}on, reads {{join . " "}}{{end}}')"
row 'Docker Compose' "$(ask docker compose version --short)"
row podman "$(ask podman --version | awk '{ print $3 }')"

section GPU
row driver "$(gpu driver_version | head -n 1)"
row GPUs "$(gpu name,memory.total,compute_cap | sed 's/\(.*\), /\1, compute capability /')"
row nvidia-ctk "$(ask nvidia-ctk --version | head -n 1)"
row 'CDI specs' "$(grep -ls 'nvidia.com/gpu' /etc/cdi/* /var/run/cdi/*)"
row 'CDI devices' "$(ask nvidia-ctk cdi list | grep 'nvidia.com/')"

section Python
row Python "$(ask "$python" --version | awk -v path="$python" '{ print $2 ", " path }')"
row Ray "$(version ray)"
row torch "$(version torch)"
row 'its CUDA' "$(ask "$python" -c '
import torch
cuda = torch.cuda
print(f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone")
for i in range(cuda.device_count()):
    print("sees", cuda.get_device_name(i), "of compute capability %d.%d" % cuda.get_device_capability(i))
if not cuda.is_available():
    print("sees no GPU")')"

section 'Variables DF_*, NVIDIA_*'
names=$(compgen -e | grep -E '^(DF|NVIDIA)_')
[ -n "$names" ] || row any ''
for name in $names; do
  value=${!name}
  # What looks like a secret is not shown.
  [[ $name =~ KEY|TOKEN|SECRET|PASS|CRED ]] && value='(hidden)'
  row "$name" "$value"
done
exit 0

"""scripts/setup_colab.sh: what it chooses for which GPU, what it installs, and the app it starts and stops."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deployments.config import check, load
from deployments.own_ray import free_port
from serve_app.settings import Settings

from .programs import Programs, nvidia_smi
from .rig import jpeg, line_mask, photo, png

SCRIPT = Path("scripts/setup_colab.sh").absolute()

T4 = "Tesla T4, 15360, 7.5"
L4 = "NVIDIA L4, 23034, 8.9"
A100 = "NVIDIA A100-SXM4-40GB, 40960, 8.0"
#: Drivers: of CUDA 12, and of CUDA 13.
OLD, NEW = "550.54.15", "580.82.07"

#: Notes its arguments; `venv` makes what the script looks for, from FAKE_PYTHON and FAKE_SERVE.
UV = """echo "uv $@" >> "$CALLS"
if [ "$1" = venv ]; then
  for folder; do :; done
  mkdir -p "$folder/bin"; cp "$FAKE_BIN/python" "$FAKE_BIN/serve" "$folder/bin/"
fi"""
#: Answers for torch: 1 is "there is no CUDA".
PYTHON = 'echo "python" >> "$CALLS"; exit ${NO_CUDA:-0}'
#: `serve run CONFIG` that is ready at once, unless told not to be, and ends on SIGINT alone.
SERVE = """
import json, os, signal, sys, yaml
from http.server import BaseHTTPRequestHandler, HTTPServer
signal.signal(signal.SIGTERM, signal.SIG_IGN)
kept = ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", "HF_TOKEN")
with open(os.environ["CALLS"], "a") as calls:
    print("serve", json.dumps({name: os.environ.get(name) for name in kept}), file=calls)
if "BROKEN" in os.environ:
    sys.exit("no module named nonsense")
class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *_): pass
config = yaml.safe_load(open(sys.argv[2]))
try:
    HTTPServer(("127.0.0.1", config["http_options"]["port"]), Ready).serve_forever()
except KeyboardInterrupt:
    with open(os.environ["CALLS"], "a") as calls:
        print("interrupted", file=calls)
"""


@dataclass
class Colab:
    """A machine as the script sees it."""

    programs: Programs
    folder: Path
    port: int

    def gpu(self, row: str) -> None:
        nvidia_smi(self.programs, row)

    def memory(self, gib: int) -> None:
        self.programs.add("getconf", f"case $1 in PAGESIZE) echo 4096 ;; *) echo {gib << 18} ;; esac")

    def run(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = {
            "PATH": self.programs.path,
            "HOME": str(self.folder),
            "FLUXFILL_FOLDER": str(self.folder / "colab"),
            "FLUXFILL_PORT": str(self.port),
            "CALLS": str(self.folder / "calls"),
            "FAKE_BIN": str(self.programs.folder),
            **variables,
        }
        # From anywhere.
        return subprocess.run([SCRIPT, *arguments], cwd="/", env=environment, capture_output=True, text=True)

    def chosen(self, *arguments: str) -> dict[str, str]:
        done = self.run("--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"^(\w+) +(.*)$", done.stdout, re.M))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def config(self) -> Path:
        return self.folder / "colab/serve_config.yaml"

    @property
    def settings(self) -> Settings:
        assert check(self.config) == []
        return load(self.config).settings

    @property
    def pid(self) -> int:
        return int((self.folder / "colab/serve.pid").read_text())

    def is_running(self) -> bool:
        with suppress(OSError):
            return str(self.config).encode() in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        return False


def free_ports() -> int:
    """The HTTP port; the broker's is 85 above."""
    while True:
        port = free_port()
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port + 85))
            return port


@pytest.fixture
def colab(tmp_path: Path) -> Iterator[Colab]:
    colab = Colab(Programs(tmp_path), tmp_path, free_ports())
    colab.programs.add("uv", UV)
    colab.programs.add("python", PYTHON)
    colab.programs.add("serve", SERVE, sys.executable)
    colab.memory(52)
    yield colab
    if colab.is_running():
        os.killpg(colab.pid, 9)


# -- what it chooses


@pytest.mark.parametrize(
    ("gpu", "torch", "variant"),
    [
        (f"{T4}, {OLD}", "2.13 for cu126", "Q4_0"),
        (f"{T4}, {NEW}", "2.13 for cu130", "Q4_0"),
        (f"{L4}, {OLD}", "2.13 for cu126", "Q8_0"),
        (f"{L4}, 580", "2.13 for cu130", "Q8_0"),
        (f"{A100}, 525.60.13", "2.13 for cu126", "Q8_0"),
        (f"{A100}, {NEW}", "2.13 for cu130", "Q8_0"),
        # CUDA 13 has no kernels for Volta.
        (f"Tesla V100-SXM2-16GB, 16384, 7.0, {NEW}", "2.13 for cu126", "Q4_0"),
        (f"NVIDIA B200, 183359, 10.0, {NEW}", "2.13 for cu130", "Q8_0"),
        (f"Tesla P4, 7680, 6.1, {OLD}", "2.13 for cpu", "telea"),
        # The first of several.
        (f"{L4}, {NEW}\n{T4}, {NEW}", "2.13 for cu130", "Q8_0"),
    ],
)
def test_torch_is_the_drivers_and_the_variant_the_gpus(colab: Colab, gpu: str, torch: str, variant: str) -> None:
    colab.gpu(gpu)
    chosen = colab.chosen()
    assert (chosen["torch"], chosen["variant"]) == (torch, variant)
    assert colab.calls == []
    assert not colab.config.exists()


def test_every_build_of_torch_is_one_that_uv_knows() -> None:
    known = subprocess.check_output([Path(sys.executable).with_name("uv"), "pip", "install", "--help"], text=True)
    built = set(re.findall(r"backend=(\w+)", SCRIPT.read_text()))
    assert built == {"cpu", "cu126", "cu130"}
    assert [one for one in built if not re.search(rf"\b{one}\b", known)] == []


def test_without_a_gpu_the_variants_that_need_none_are_served(colab: Colab) -> None:
    assert (colab.chosen()["torch"], colab.chosen()["variant"]) == ("2.13 for cpu", "telea")
    colab.programs.add("nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert colab.chosen()["variant"] == "telea"


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (f"{T4}, 470.82.01", "The driver is 470.82.01, and torch 2.13 needs 525.60.13 or later."),
        (f"NVIDIA B200, 183359, 10.0, {OLD}", f"The driver is {OLD}, and NVIDIA B200 needs 580 or later."),
    ],
)
def test_a_driver_that_runs_no_such_torch_is_named(colab: Colab, gpu: str, said: str) -> None:
    colab.gpu(gpu)
    done = colab.run()
    assert (done.returncode, done.stderr) == (1, f"{said}\n")
    assert colab.calls == []


# -- what it writes


def test_a_t4s_little_memory_is_shared_in_turn(colab: Colab) -> None:
    colab.gpu(f"{T4}, {OLD}")
    colab.memory(12)
    assert colab.run(HF_TOKEN="t").returncode == 0
    assert (colab.settings.text_encoder.num_gpus, colab.settings.variants["Q4_0"].min_replicas) == (1, 0)
    # It computes in float32.
    assert colab.settings.work.inference_timeout_s == 1200


def test_an_l4_keeps_its_model_and_encodes_on_the_cpu(colab: Colab) -> None:
    colab.gpu(f"{L4}, {NEW}")
    assert colab.run(HF_TOKEN="t").returncode == 0
    assert (colab.settings.text_encoder.num_gpus, colab.settings.variants["Q8_0"].min_replicas) == (0, 1)
    assert load(colab.config).inference.variant == "Q8_0"
    assert colab.settings.work.inference_timeout_s == 240
    assert not colab.settings.is_production


def test_weights_may_lie_elsewhere(colab: Colab) -> None:
    drive = colab.folder / "My Drive"
    assert colab.run(FLUXFILL_WEIGHTS=str(drive)).returncode == 0
    assert colab.settings.weights.cache == drive


def test_weights_that_are_gated_need_a_token_before_anything_is_installed(colab: Colab) -> None:
    colab.gpu(f"{L4}, {NEW}")
    done = colab.run()
    assert (done.returncode, "HF_TOKEN" in done.stderr, colab.calls) == (1, True, [])
    # Unless they are there.
    (colab.folder / "colab/weights/models").mkdir(parents=True)
    assert colab.run().returncode == 0


# -- what it installs and starts


def test_it_installs_what_the_driver_can_run_and_starts_the_app(colab: Colab) -> None:
    colab.gpu(f"{L4}, {OLD}")
    done = colab.run(HF_TOKEN="t")
    folder = colab.folder / "colab"
    assert done.returncode == 0, done.stderr
    assert colab.calls[:3] == [
        f"uv venv --quiet --python 3.11 --managed-python {folder}/venv",
        f"uv pip install --quiet --python {folder}/venv/bin/python --torch-backend cu126 "
        f"-c {folder}/constraints.txt -e .[diffusion]",
        "python",
    ]
    assert json.loads(colab.calls[3].removeprefix("serve ")) == {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "500000000",
        "HF_TOKEN": "t",
    }
    assert f"Ready: http://127.0.0.1:{colab.port}/ready" in done.stdout
    assert f"{folder}/venv/bin/fluxfill submit -c {colab.config} --original" in done.stdout
    # The pins are the project's, but torch's is no longer a CPU's.
    pins = Path("constraints.txt").read_text()
    assert "torch==2.13.0+cpu\n" in pins
    assert (folder / "constraints.txt").read_text() == pins.replace("+cpu", "")


def test_run_again_it_changes_nothing(colab: Colab) -> None:
    colab.run()
    first, pid, config = colab.calls, colab.pid, colab.config.read_text()
    done = colab.run()
    assert (done.returncode, colab.calls, colab.pid, colab.config.read_text()) == (0, first, pid, config)
    assert "Ready" in done.stdout


def test_stopped_and_run_again_it_starts_the_app_alone_and_keeps_the_config(colab: Colab) -> None:
    colab.run()
    colab.config.write_text(f"{colab.config.read_text()}# mine\n")
    assert colab.run("--stop").stdout == "Stopped.\n"
    assert (colab.calls[-1], colab.is_running()) == ("interrupted", False)
    assert colab.run("--stop").stdout == "The app does not run.\n"
    before = len(colab.calls)
    assert colab.run().returncode == 0
    assert [call.split()[0] for call in colab.calls[before:]] == ["serve"]
    assert colab.config.read_text().endswith("# mine\n")


def test_another_gpu_gets_another_torch(colab: Colab) -> None:
    colab.gpu(f"{T4}, {OLD}")
    colab.run(HF_TOKEN="t")
    colab.run("--stop")
    colab.gpu(f"{T4}, {NEW}")
    colab.run(HF_TOKEN="t")
    installed = [call for call in colab.calls if "pip install" in call]
    assert ["cu126" in installed[0], "cu130" in installed[1], len(installed)] == [True, True, 2]


def test_a_gpu_that_torch_does_not_see_is_a_sentence(colab: Colab) -> None:
    colab.gpu(f"{L4}, {NEW}")
    done = colab.run(HF_TOKEN="t", NO_CUDA="1")
    assert (done.returncode, "torch for cu130 sees no CUDA" in done.stderr) == (1, True)
    assert colab.calls[-1] == "python"
    # Nothing of it counts as installed.
    assert colab.run(HF_TOKEN="t", NO_CUDA="1").returncode == 1


def test_an_app_that_ends_at_its_start_shows_why(colab: Colab) -> None:
    done = colab.run(BROKEN="1")
    assert (done.returncode, "no module named nonsense" in done.stderr) == (1, True)


def test_another_programs_port_is_left_to_it(colab: Colab) -> None:
    with socket.create_server(("127.0.0.1", colab.port)) as server:
        server.listen()
        answering = f"import socket; s = socket.fromfd({server.fileno()}, socket.AF_INET, socket.SOCK_STREAM)"
        loop = "while True:\n c, _ = s.accept(); c.recv(999); c.sendall(b'HTTP/1.0 404 No\\r\\n\\r\\n'); c.close()"
        other = subprocess.Popen([sys.executable, "-c", f"{answering}\n{loop}"], pass_fds=[server.fileno()])
        try:
            done = colab.run()
        finally:
            other.kill()
            other.wait()
    assert (done.returncode, "set FLUXFILL_PORT" in done.stderr) == (1, True)
    assert [call for call in colab.calls if call.startswith("serve")] == []


def test_a_process_that_has_the_apps_old_number_is_not_stopped(colab: Colab) -> None:
    colab.run()
    colab.run("--stop")
    with subprocess.Popen(["sleep", "60"]) as other:
        (colab.folder / "colab/serve.pid").write_text(str(other.pid))
        assert colab.run("--stop").stdout == "The app does not run.\n"
        assert other.poll() is None
        other.kill()


def test_uv_is_installed_where_it_is_missing(colab: Colab) -> None:
    (colab.programs.folder / "uv").rename(colab.programs.folder / "uv-to-be")
    colab.programs.add("python3", 'echo "python3 $@" >> "$CALLS"; cp "$FAKE_BIN/uv-to-be" "$FAKE_BIN/uv"')
    assert colab.run().returncode == 0
    assert colab.calls[0] == "python3 -m pip install --quiet uv"


def test_an_unknown_option_is_answered_with_the_usage(colab: Colab) -> None:
    done = colab.run("--start")
    assert (done.returncode, "--dry-run" in done.stdout, colab.calls) == (2, True, [])


# -- the real app


@pytest.mark.serve
@pytest.mark.timeout(280)
def test_the_real_app_starts_edits_a_photo_and_stops(colab: Colab, tmp_path: Path) -> None:
    # In the place of an installation, this one.
    colab.programs.add("uv", f'if [ "$1" = venv ]; then for folder; do :; done; ln -s {sys.prefix} "$folder"; fi')
    with tempfile.TemporaryDirectory(prefix="ray-") as ray:
        started = colab.run(RAY_TMPDIR=ray)
        assert started.returncode == 0, started.stderr
        original, mask = tmp_path / "photo.jpg", tmp_path / "mask.png"
        original.write_bytes(jpeg(photo()))
        mask.write_bytes(png(line_mask()))
        edit = [sys.prefix + "/bin/fluxfill", "submit", "-c", colab.config, "--original", original, "--mask", mask]
        subprocess.run([*edit, "--out", tmp_path / "out"], check=True, capture_output=True)
        assert [path.name for path in (tmp_path / "out").rglob("*.jpg")] != []
        assert colab.run("--stop").stdout == "Stopped.\n"
        assert "Got KeyboardInterrupt, shutting down" in (colab.folder / "colab/serve.log").read_text()
        assert [
            process.name() for process in psutil.process_iter(["cmdline"]) if ray in str(process.info["cmdline"])
        ] == []

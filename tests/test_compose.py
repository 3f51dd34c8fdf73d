"""compose.yaml: Compose's own schema, rules that the schema misses, and files beside it that must agree with it."""

import asyncio
import copy
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments.app import build
from deployments.config import check, load
from serve_app.adapters.pubsub.embedded import wanted
from serve_app.settings import Secrets

from .backends import Broker, Recorder, until

COMPOSE = yaml.safe_load(Path("compose.yaml").read_text())
SERVICES = COMPOSE["services"]
CPU, GPU = Path("compose/serve_config.yaml"), Path("compose/serve_config.gpu.yaml")
SETTINGS = load(CPU).settings
SCHEMA = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))

Service = Mapping[str, Any]


# -- rules

GPUS = [{"driver": "cdi", "device_ids": ["nvidia.com/gpu=all"], "capabilities": ["gpu"]}]
#: Names of variables that hold a secret.
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|API_KEYS|MC_HOST")


def is_app(service: Service) -> bool:
    return "build" in service


def waits_rightly(service: Service) -> bool:
    """For health where there is a check of it, else for the end."""

    def condition(name: str) -> str:
        return "service_healthy" if "healthcheck" in SERVICES[name] else "service_completed_successfully"

    return all(how["condition"] == condition(name) for name, how in service.get("depends_on", {}).items())


def gives_secrets_by_name(service: Service) -> bool:
    environment = service.get("environment", {})
    return all("${" in value for name, value in environment.items() if SECRET.search(name))


def mounts_files_read_only(service: Service) -> bool:
    mounts = [volume.split(":") for volume in service.get("volumes", ())]
    return all(Path(source).is_file() and rest[1:] == ["ro"] for source, *rest in mounts if source.startswith("."))


def stops_in_time(service: Service) -> bool:
    config = build(SETTINGS)._bound_deployment._deployment_config
    return (
        not is_app(service) or int(service["stop_grace_period"].removesuffix("s")) > config.graceful_shutdown_timeout_s
    )


def gets_the_gpus(service: Service) -> bool:
    found = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
    return found == (GPUS if service.get("profiles") == ["gpu"] else None)


RULES: Mapping[str, Callable[[Service], bool]] = {
    "its image is pinned": lambda s: bool(re.search(r":[^:]*\d", s["image"])),
    "it gains no privileges": lambda s: "no-new-privileges:true" in s.get("security_opt", ()),
    "its ports are open on loopback alone": lambda s: all(str(p).startswith("127.0.0.1:") for p in s.get("ports", ())),
    "it has a health check, or ends by itself": lambda s: ("healthcheck" in s) != (s.get("restart") == "no"),
    "it waits for health, or for an end": waits_rightly,
    "it waits for no profile's service": lambda s: not any("profiles" in SERVICES[n] for n in s.get("depends_on", ())),
    "its secrets come from .env": gives_secrets_by_name,
    "its files are mounted read-only": mounts_files_read_only,
    "it gets the GPUs by CDI in profile gpu alone": gets_the_gpus,
    "the app runs as 10001": lambda s: not is_app(s) or s.get("user") == "10001:10001",
    "the app has no capabilities": lambda s: not is_app(s) or s.get("cap_drop") == ["ALL"],
    "the app's root is read-only": lambda s: not is_app(s) or s.get("read_only") is True,
    "the app can write to /tmp": lambda s: not is_app(s) or s.get("tmpfs", [""])[0].startswith("/tmp:"),
    "the app has shared memory": lambda s: not is_app(s) or "shm_size" in s,
    "the app has an init": lambda s: not is_app(s) or s.get("init") is True,
    "serve run is stopped by SIGINT": lambda s: not is_app(s) or s.get("stop_signal") == "SIGINT",
    "the app may stop as slowly as its ingress": stops_in_time,
}


def problems(compose: Mapping[str, Any]) -> Iterator[str]:
    """`path: schema: …` for what the schema refuses, `service: rule` for each rule that is broken."""
    for error in VALIDATOR.iter_errors(compose):
        yield f"{'.'.join(map(str, error.absolute_path))}: schema: {error.message[:200]}"
    for name, service in compose["services"].items():
        yield from (f"{name}: {rule}" for rule, holds in RULES.items() if not holds(service))


def test_compose_yaml_keeps_the_rules() -> None:
    assert list(problems(COMPOSE)) == []


CDI = "deploy.resources.reservations.devices"
NVIDIA = [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
#: A service, the path of a key in it, what is put there (None: nothing is), and what is said of it.
FAULTS: list[tuple[str, str, object, str]] = [
    ("minio", "image", "pgsty/minio:latest", "its image is pinned"),
    ("grafana", "image", "grafana/grafana", "its image is pinned"),
    ("postgres", "security_opt", None, "it gains no privileges"),
    ("prometheus", "ports", ["9090:9090"], "its ports are open on loopback alone"),
    ("pubsub", "ports", [8085], "its ports are open on loopback alone"),
    ("firestore", "healthcheck", None, "it has a health check, or ends by itself"),
    ("app-cpu", "depends_on.pubsub.condition", "service_started", "it waits for health, or for an end"),
    ("app-gpu", "depends_on.bucket.condition", "service_healthy", "it waits for health, or for an end"),
    ("grafana", "depends_on", {"app-cpu": {"condition": "service_healthy"}}, "it waits for no profile's service"),
    ("postgres", "environment.POSTGRES_PASSWORD", "postgres", "its secrets come from .env"),
    ("bucket", "environment.MC_HOST_minio", "http://u:p@minio:9000", "its secrets come from .env"),
    ("prometheus", "volumes", ["./compose/prometheus.yaml:/etc/p.yaml"], "its files are mounted read-only"),
    ("grafana", "volumes", ["./compose/absent.yaml:/etc/g.yaml:ro"], "its files are mounted read-only"),
    ("app-gpu", "deploy", None, "it gets the GPUs by CDI in profile gpu alone"),
    ("app-gpu", CDI, NVIDIA, "it gets the GPUs by CDI in profile gpu alone"),
    ("app-cpu", "deploy", SERVICES["app-gpu"]["deploy"], "it gets the GPUs by CDI in profile gpu alone"),
    ("app-gpu", CDI, [{"driver": "cdi", "device_ids": ["nvidia.com/gpu=all"]}], "schema: 'capabilities' is a required"),
    ("app-gpu", "devices", GPUS, "schema: "),
    ("app-cpu", "readonly", True, "schema: Unevaluated properties"),
    ("app-cpu", "user", "0:0", "the app runs as 10001"),
    ("app-cpu", "cap_drop", None, "the app has no capabilities"),
    ("app-gpu", "read_only", False, "the app's root is read-only"),
    ("app-gpu", "tmpfs", None, "the app can write to /tmp"),
    ("app-gpu", "shm_size", None, "the app has shared memory"),
    ("app-cpu", "init", None, "the app has an init"),
    ("app-cpu", "stop_signal", None, "serve run is stopped by SIGINT"),
    ("app-cpu", "stop_grace_period", "95s", "the app may stop as slowly as its ingress"),
]


@pytest.mark.parametrize(("service", "path", "value", "said"), FAULTS)
def test_a_fault_is_found_by_name(service: str, path: str, value: object, said: str) -> None:
    faulty = copy.deepcopy(SERVICES[service])
    *parents, last = path.split(".")
    at = faulty
    for key in parents:
        at = at[key]
    at.pop(last) if value is None else at.update({last: value})
    found = list(problems({"services": {service: faulty}}))
    assert any(service in problem and said in problem for problem in found), found


def test_every_rule_finds_a_fault() -> None:
    assert set(RULES) - {said for *_, said in FAULTS} == set()


# -- what must agree


def test_both_profiles_are_one_app_but_for_what_paints() -> None:
    ours = {"profiles", "image", "build", "volumes", "deploy"}
    apps = [{key: value for key, value in SERVICES[name].items() if key not in ours} for name in ("app-cpu", "app-gpu")]
    assert apps[0] == apps[1]
    configs = [yaml.safe_load(path.read_text()) for path in (CPU, GPU)]
    for config in configs:
        app = config["applications"][0]
        del app["args"]["variants"], app["args"]["generators"], app["args"]["text_encoder"], app["args"]["audit"]
        del app["deployments"][0]["user_config"]["variant"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("path", [CPU, GPU], ids=str)
def test_the_apps_configs_are_valid_and_serve_what_their_profile_can(path: Path) -> None:
    assert check(path) == []
    settings = load(path).settings
    assert any(settings.variant(name).num_gpus for name in settings.variants) == (path == GPU)


def test_the_app_is_called_where_it_listens() -> None:
    config, app = load(CPU), SERVICES["app-cpu"]
    assert app["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
    assert config.settings.public_url == f"http://127.0.0.1:{config.port}"
    assert app["healthcheck"]["test"][-1] == f"{config.settings.public_url}/ready"


def test_the_apps_stores_are_compose_s() -> None:
    app = SERVICES["app-cpu"]["environment"]
    assert f"http://{app['FIRESTORE_EMULATOR_HOST']}/" == "http://firestore:8086/"
    assert SERVICES["firestore"]["command"][-1].endswith(":8086")
    database = SERVICES["postgres"]["environment"]
    assert f"postgresql://{database['POSTGRES_USER']}@postgres/{database['POSTGRES_DB']}" == SETTINGS.jobs
    assert app["PGPASSWORD"] == database["POSTGRES_PASSWORD"]
    minio = SERVICES["minio"]["environment"]
    keys = minio["MINIO_ROOT_USER"], minio["MINIO_ROOT_PASSWORD"]
    assert (app["AWS_ACCESS_KEY_ID"], app["AWS_SECRET_ACCESS_KEY"]) == keys
    made = SERVICES["bucket"]["entrypoint"][-1].removeprefix("minio/")
    assert SETTINGS.blobs.startswith(f"s3://{made}?endpoint=http://minio:9000&")


def test_prometheus_asks_where_ray_exports_its_metrics() -> None:
    port = re.search(r"--metrics-export-port=(\d+)", SERVICES["app-cpu"]["command"][-1])
    (alias,) = SERVICES["app-cpu"]["networks"]["default"]["aliases"]
    (job,) = yaml.safe_load(Path("compose/prometheus.yaml").read_text())["scrape_configs"]
    assert port is not None
    assert job["static_configs"] == [{"targets": [f"{alias}:{port[1]}"]}]
    (source,) = yaml.safe_load(Path("compose/grafana/datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_rays_objects_fit_into_the_shared_memory() -> None:
    app = SERVICES["app-cpu"]
    size = re.search(r"--object-store-memory=(\d+)", app["command"][-1])
    assert size is not None
    assert int(size[1]) < int(app["shm_size"].removesuffix("g")) << 30


def test_each_variable_has_its_line_in_the_example_and_each_volume_its_mount() -> None:
    text = Path("compose.yaml").read_text()
    example = re.findall(r"^(\w+)=", Path("compose/.env.example").read_text(), re.M)
    assert sorted(example) == sorted(set(re.findall(r"\$\{(\w+)", text)))
    sources = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert {source for source in sources if not source.startswith("./")} == set(COMPOSE["volumes"])
    assert {name.upper() for name in Secrets.model_fields} - set(SERVICES["app-cpu"]["environment"]) == {
        "FIREBASE_CREDENTIALS"
    }


@pytest.mark.emulator
async def test_googles_emulator_gets_the_apps_topics(emulator_address: str, tmp_path: Path) -> None:
    """By compose.yaml's own script; only the emulator has been started already."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/bin/sh\nexec sleep 300\n")
    gcloud.chmod(0o755)
    script = SERVICES["pubsub"]["command"][-1].replace("$$", "$").replace("127.0.0.1:8085", emulator_address)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    running = await asyncio.create_subprocess_exec("bash", "-ec", script, env=environment, start_new_session=True)
    try:
        await _wait_healthy(emulator_address)
        messages = SETTINGS.messages.model_copy(update={"url": f"pubsub://{emulator_address}"})
        broker, recorder = Broker("compose", messages), Recorder(None)
        async with broker.source(recorder):
            await broker.publish(b"a message")
            await until(lambda: recorder.has(b"a message"))
        made = subprocess.check_output(["curl", "-s", f"http://{emulator_address}/v1/projects/local/subscriptions"])
        pairs = {(one["name"], one["topic"]) for one in json.loads(made)["subscriptions"]}
        assert pairs == {(one.name, one.topic) for one in wanted(messages)}
    finally:
        os.killpg(running.pid, 9)
        await running.wait()


async def _wait_healthy(address: str) -> None:
    command = [word.replace("127.0.0.1:8085", address) for word in SERVICES["pubsub"]["healthcheck"]["test"][1:]]
    async with asyncio.timeout(60):
        while await (await asyncio.create_subprocess_exec(*command)).wait():
            await asyncio.sleep(0.1)


# -- make


class Checkout:
    """The files that `make up` uses, and a docker that notes how it is called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.cdi = folder, folder / "bin", folder / "cdi"
        self.bin.mkdir()
        self.cdi.mkdir()
        shutil.copy("Makefile", folder)
        shutil.copytree("compose", folder / "compose")
        self.program("docker", 'echo "docker $@" >> calls')

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def make(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        command = ["make", f"CDI_FOLDERS={self.cdi}", *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_up_takes_the_cpu_where_there_is_no_gpu(checkout: Checkout) -> None:
    assert checkout.make("up").returncode == 0
    assert checkout.calls == ["docker compose --profile cpu up --build --detach"]


def test_up_takes_the_gpu_that_a_cdi_spec_describes(checkout: Checkout) -> None:
    (checkout.cdi / "nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
    assert checkout.make("up").returncode == 0
    assert checkout.calls == ["docker compose --profile gpu up --build --detach"]


def test_up_says_what_is_missing_where_no_cdi_spec_describes_the_gpu(checkout: Checkout) -> None:
    checkout.program("nvidia-smi", "exit 0")
    refused = checkout.make("up")
    assert (refused.returncode, "make gpu-cdi-generate" in refused.stderr) == (2, True)
    assert checkout.make("up", "PROFILE=cpu").returncode == 0
    assert checkout.calls == ["docker compose --profile cpu up --build --detach"]


def test_up_makes_secrets_once_and_for_their_owner_alone(checkout: Checkout) -> None:
    checkout.make("up")
    path = checkout.folder / ".env"
    first = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    values = dict(line.split("=", 1) for line in first.splitlines() if not line.startswith("#"))
    assert {values.pop(name) for name in [*values] if name.startswith(("WEBHOOK_", "HF_", "DF_"))} == {""}
    assert values["API_KEYS"].endswith(":jobs+audit")
    made = [value.removesuffix(":jobs+audit") for value in values.values()]
    assert len(set(made)) == 5
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made)
    checkout.make("up")
    assert path.read_text() == first


def test_down_logs_and_status_reach_both_profiles(checkout: Checkout) -> None:
    for target in ("down", "logs", "status"):
        checkout.make(target)
    both = "docker compose --profile cpu --profile gpu"
    assert checkout.calls == [f"{both} down", f"{both} logs --follow --tail 100", f"{both} ps --all"]


def test_another_compose_can_be_named(checkout: Checkout) -> None:
    checkout.program("podman-compose", 'echo "podman-compose $@" >> calls')
    checkout.make("up", "COMPOSE=podman-compose")
    assert checkout.calls == ["podman-compose --profile cpu up --build --detach"]


def test_a_cdi_spec_is_generated_and_shown(checkout: Checkout) -> None:
    checkout.program("sudo", 'exec "$@"')
    checkout.program("nvidia-ctk", 'echo "nvidia-ctk $@" >> calls')
    assert checkout.make("gpu-cdi-generate").returncode == 0
    assert checkout.calls == ["nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml", "nvidia-ctk cdi list"]


def test_without_nvidia_s_toolkit_no_spec_is_generated(checkout: Checkout) -> None:
    refused = checkout.make("gpu-cdi-generate")
    assert (refused.returncode, "nvidia-ctk is missing" in refused.stderr) == (2, True)


def test_the_smoke_test_asks_torch_in_the_container(checkout: Checkout) -> None:
    assert checkout.make("gpu-test").returncode == 0
    (call,) = checkout.calls
    assert call.startswith("docker compose --profile gpu run --build --rm --no-deps app-gpu bash -c nvidia-smi")
    assert "torch.cuda.is_available()" in call


# -- DEV.md


def test_the_developers_guide_names_ports_targets_and_files_that_there_are() -> None:
    guide = Path("DEV.md").read_text()
    rows = re.findall(r"^\| (\d[\d, ]+) \|", guide, re.M)
    open_ports = {port.split(":")[1] for service in SERVICES.values() for port in service.get("ports", ())}
    assert {port for row in rows for port in row.split(", ")} == open_ports
    makefile = Path("Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z][a-z-]+)", guide))
    assert {"up", "down", "logs", "status", "inspect-env", "gpu-cdi-generate", "gpu-test"} <= targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.M)] == []
    assert [path for path in re.findall(r"\]\(([^)]+)\)", guide) if not Path(path).exists()] == []

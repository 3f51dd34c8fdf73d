"""Everything under k8s/ renders, is what the API server accepts, and breaks no rule of ours."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.audit_job import JOB_CPUS, POOL

from .k8s import render, rules, schemas
from .k8s.objects import cluster, of_kind, ray_service, serve_config

L4, SPOT, MINIMAL = (Path("k8s/overlays") / name for name in ("l4", "l4-spot", "minimal"))
#: Rules that an overlay breaks on purpose.
EXCEPTIONS = {
    MINIMAL: {
        "autoscaler_is_v2": "one worker, always",
        "gcs_survives_the_head": "everything it stores ends with its one worker",
        "groups_hold_what_serve_asks_for": "no node to spare",
        "one_token_for_both_clusters": "a trial needs no Secret, and is not upgraded",
    }
}


@pytest.mark.parametrize("folder", render.FOLDERS, ids=str)
def test_a_folder_renders_and_the_api_server_would_accept_it(folder: Path) -> None:
    schemas.need_definitions()
    assert list(schemas.schemas_hold(render.render(folder))) == []


@pytest.mark.parametrize("file", render.SECRETS, ids=str)
def test_the_api_server_would_accept_the_examples_of_secrets(file: Path) -> None:
    assert list(schemas.schemas_hold(render.read(file))) == []


@pytest.mark.parametrize("overlay", render.OVERLAYS, ids=str)
def test_an_overlay_breaks_only_the_rules_that_it_means_to(overlay: Path) -> None:
    broken = rules.broken(render.world(overlay))
    assert {name: what for name, what in broken.items() if name not in EXCEPTIONS.get(overlay, {})} == {}
    assert broken.keys() == EXCEPTIONS.get(overlay, {}).keys(), "an exception that is not needed"


@pytest.mark.parametrize("folder", render.FOLDERS, ids=str)
def test_no_folder_brings_a_secret(folder: Path) -> None:
    assert of_kind(render.render(folder), "Secret") == []


def test_both_ways_to_bring_secrets_bring_the_same_keys() -> None:
    plain, external = (render.read(Path("k8s/secrets") / name) for name in ("plain.yaml", "external-secrets.yaml"))
    keys = {one["metadata"]["name"]: {*one["data"]} for one in of_kind(plain, "Secret")}
    assert keys == {
        one["metadata"]["name"]: {row["secretKey"] for row in one["spec"]["data"]}
        for one in of_kind(external, "ExternalSecret")
    }


# -- one truth

GOOGLE = "Google's stores and broker, with names of their own"
CLUSTER = "a cluster of several nodes, which others reach"
PAINTERS = "FLUX.1-Fill and SDXL on GPUs; the laptop has tiny variants with random weights"
IN_THE_POD = "the pod's root is read-only"
#: Keys in which an overlay's config may differ from serve_config.yaml: the only value that it may have instead (None:
#: any), and why.
DIFFERENCES: dict[Path, dict[str, tuple[Any, str]]] = {
    L4: {
        "proxy_location": ("EveryNode", "KubeRay asks the proxy on each worker whether it is ready"),
        "http_options.host": ("0.0.0.0", CLUSTER),
        "nodes": (None, CLUSTER),
        "public_url": (None, CLUSTER),
        "push.enabled": (False, "the app pulls; an open push would be for everyone"),
        "blobs": (None, GOOGLE),
        "jobs": (None, GOOGLE),
        "messages.url": ("pubsub:", GOOGLE),
        "messages.project": (None, GOOGLE),
        "weights.*": (None, "a volume that a Job fills"),
        "variants.*": (None, PAINTERS),
        "generators.*": (None, PAINTERS),
        "text_encoder.*": (None, PAINTERS),
        "audit.matrix.variants": (None, PAINTERS),
        "audit.gpus": (None, "the cluster adds nodes"),
        "Ingress.user_config.variant": (None, PAINTERS),
        "*.ray_actor_options.*": (None, "what needs no GPU keeps no GPU node awake"),
    },
    MINIMAL: {
        "proxy_location": ("EveryNode", "KubeRay asks the proxy on each worker whether it is ready"),
        "blobs": (None, IN_THE_POD),
        "jobs": (None, IN_THE_POD),
        "weights.*": (None, IN_THE_POD),
    },
}
DIFFERENCES[SPOT] = DIFFERENCES[L4]


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Every value by its keys: the app's args by their names, a deployment's options after its name."""
    app = config["applications"][0]
    top = {key: value for key, value in config.items() if key != "applications"}
    rest = {key: value for key, value in app.items() if key not in ("args", "deployments")}
    named = {one["name"]: {key: value for key, value in one.items() if key != "name"} for one in app["deployments"]}
    found: dict[str, Any] = {}

    def visit(part: Any, path: str) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                visit(value, f"{path}.{key}" if path else key)
        else:
            found[path] = part

    visit({**top, **rest, **app["args"], **named}, "")
    return found


@pytest.mark.parametrize("overlay", render.OVERLAYS, ids=str)
def test_an_overlays_config_is_the_laptops_but_for_known_keys(overlay: Path) -> None:
    own, ours = flat(serve_config(render.render(overlay))), flat(yaml.safe_load(Path("serve_config.yaml").read_text()))
    missing = object()
    differing = {key for key in own | ours if own.get(key, missing) != ours.get(key, missing)}
    allowed = DIFFERENCES[overlay]
    patterns = {key: next((one for one in allowed if fnmatch(key, one)), None) for key in sorted(differing)}
    assert [key for key, pattern in patterns.items() if pattern is None] == []
    for key, pattern in patterns.items():
        only, why = allowed[pattern or ""]
        assert only is None or own.get(key) == only, f"{key}: {own.get(key)}; {why}"
    assert {*patterns.values()} == allowed.keys(), "a difference that is not needed"


@pytest.mark.parametrize("overlay", render.OVERLAYS, ids=str)
def test_kuberay_is_told_which_ray_it_starts(overlay: Path) -> None:
    version = cluster(render.render(overlay))["rayVersion"]
    assert f"\nray=={version}\n" in Path("constraints.txt").read_text()


@pytest.mark.parametrize("overlay", render.OVERLAYS, ids=str)
def test_the_config_in_the_pods_is_the_one_that_is_served(overlay: Path) -> None:
    objects = render.render(overlay)
    (config,) = [one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"] == "serve-config"]
    assert [*config["data"].values()] == [ray_service(objects)["spec"]["serveConfigV2"]]


def test_an_audits_job_reserves_what_one_over_http_does() -> None:
    (job,) = [one for one in render.render(Path("k8s/audit")) if one["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container.get("args", ())]
    assert float(words[words.index("--entrypoint-num-cpus") + 1]) == JOB_CPUS
    assert json.loads(words[words.index("--entrypoint-label-selector") + 1]).keys() == {POOL}

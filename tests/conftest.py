"""Fixtures of the whole suite. The environment is scrubbed of the developer's credentials, servers and proxies."""

import os

import hypothesis
import pytest

from deployments.own_ray import ray_environment

for name in ("HF_TOKEN", "FIREBASE_CREDENTIALS", "API_KEYS", "WEBHOOK_SECRET", "GOOGLE_APPLICATION_CREDENTIALS"):
    os.environ.pop(name, None)
for name in (
    "PUBSUB_EMULATOR_HOST",
    "MONITORING_EMULATOR_HOST",
    "FIRESTORE_EMULATOR_HOST",
    "STORAGE_EMULATOR_HOST",
    "RAY_ADDRESS",
):
    os.environ.pop(name, None)
for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_CLOUD_", "PG", "FLUXFILL_", "OTEL_"))]:
    del os.environ[name]
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
# Ray reads these when it is first imported. It starts by no accident: tests say when.
os.environ.update(ray_environment(), RAY_ENABLE_AUTO_CONNECT="0", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

# A slow machine is no fault.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

pytest_plugins = ["tests.backends", "tests.blob_servers", "tests.job_servers", "tests.engine_fixtures", "tests.browser"]
pytest_plugins += ["tests.serving", "tests.file_times", "tests.tiny_studio"]


# First: xdist reads the groups in a hook of the same name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that needs Ray goes to one worker, so that one Ray is started."""
    for item in items:
        if item.get_closest_marker("serve"):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Files among the parameters are numbered: a test's name must not depend on when they were made.

    A colour profile holds the second of its making, and xdist refuses workers whose tests have different names.
    """
    return argname if isinstance(val, bytes) and len(val) > 16 else None

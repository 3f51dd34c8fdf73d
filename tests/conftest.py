"""Fixtures of the whole suite. The environment is scrubbed, so that nobody's own credentials or servers are met."""

import os

from deployments.own_ray import ray_environment

for name in ("HF_TOKEN", "FIREBASE_CREDENTIALS", "API_KEYS", "WEBHOOK_SECRET", "GOOGLE_APPLICATION_CREDENTIALS"):
    os.environ.pop(name, None)
for name in ("PUBSUB_EMULATOR_HOST", "FIRESTORE_EMULATOR_HOST", "STORAGE_EMULATOR_HOST", "RAY_ADDRESS"):
    os.environ.pop(name, None)
for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_CLOUD_", "PG"))]:
    del os.environ[name]
# Ray reads these when it is first imported.
os.environ.update(ray_environment(), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

pytest_plugins = ["tests.backends", "tests.blob_servers", "tests.job_servers", "tests.engine_fixtures", "tests.browser"]

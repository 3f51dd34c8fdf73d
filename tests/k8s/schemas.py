"""Strict validation without a cluster: what the API server would refuse or silently drop.

Kubernetes' own kinds by kubernetes-validate's schemas; KubeRay's, Config Connector's and PodMonitor by their
CustomResourceDefinitions, which are not part of the project.
"""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate import utils
from referencing import Registry, Resource

from tests.absent import CRDS, absent

from .objects import Object, Objects, at

#: GKE's regular channel.
KUBERNETES = "1.33.0"
DEFINITIONS = Path(os.environ.get("CRDS", "../shared/crds"))
#: Kinds whose definitions are at hand nowhere.
UNKNOWN = {"ExternalSecret", "SecretStore", "ClusterSecretStore", "Kustomization"}

_STRICT = f"kubernetes-json-schema/v{KUBERNETES}-local-strict"
_META = {"$ref": "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}


def need_definitions() -> None:
    """Without CustomResourceDefinitions the test is skipped, or fails in CI."""
    if not _files():
        absent(CRDS)


def schemas_hold(objects: Objects) -> Iterator[str]:
    """One sentence for each part that a strict API server refuses. Without definitions, of Kubernetes' own kinds."""
    for one in objects:
        if one["kind"] in UNKNOWN or (_is_custom(one["apiVersion"]) and not _files()):
            continue
        yield from _problems(json.dumps(one))


@cache
def _problems(text: str) -> list[str]:
    """Of one object: most are looked at again and again, unchanged."""
    one = json.loads(text)
    try:
        errors = list(_validator(one["apiVersion"], one["kind"]).iter_errors(one))
    except (FileNotFoundError, KeyError):
        return [f"{at(one)}: apiVersion: no schema of {one['apiVersion']} is at hand"]
    return [f"{at(one)}: {'.'.join(map(str, e.absolute_path)) or 'the object'}: {e.message[:200]}" for e in errors]


@cache
def _validator(version: str, kind: str) -> Draft202012Validator:
    group = version.rpartition("/")[0]
    if _is_custom(version):
        schema = _defined(version, kind)
    else:
        name = f"{kind}-{group.partition('.')[0]}-{version.rpartition('/')[2]}.json".replace("--", "-").lower()
        schema = utils.schema_contents(f"{_STRICT}/{name}", KUBERNETES)
    return Draft202012Validator(schema, registry=_registry())


@cache
def _registry() -> Registry[Any]:
    return Resource.from_contents(utils.schema_contents(f"{_STRICT}/_definitions.json", KUBERNETES)) @ Registry()


def _is_custom(version: str) -> bool:
    """Kubernetes' own groups are apps, batch and the like, and those that end in k8s.io."""
    group = version.rpartition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


@cache
def _files() -> list[Path]:
    return sorted(DEFINITIONS.glob("*.yaml"))


def _defined(version: str, kind: str) -> Object:
    """The schema of a CustomResourceDefinition. Raises KeyError where none describes the kind."""
    for text in (file.read_text() for file in _files()):
        # Parsing is slow: only the file that can be it.
        if f"\n    kind: {kind}\n" in text:
            spec = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]
            for one in spec["versions"]:
                if f"{spec['group']}/{one['name']}" == version:
                    schema = _strict(one["schema"]["openAPIV3Schema"])
                    # A definition says nothing of what all objects share.
                    shared = {"metadata": _META, "apiVersion": {"type": "string"}, "kind": {"type": "string"}}
                    return {**schema, "properties": {**schema["properties"], **shared}}
    raise KeyError(kind)


def _strict(schema: Object) -> Object:
    """A structural schema as JSON Schema, where a key that it does not name is refused: a server would drop it."""
    strict = {**schema}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    if "properties" in schema:
        properties = schema["properties"]
        strict["properties"] = {name: _strict(one) for name, one in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
        # Defaults are filled in before anything is required.
        strict["required"] = [name for name in schema.get("required", ()) if "default" not in properties.get(name, {})]
    if schema.get("nullable"):
        return {"anyOf": [strict, {"type": "null"}]}
    return strict

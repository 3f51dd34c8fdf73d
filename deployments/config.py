"""Reading a Serve config file, strictly: every problem in it, with its line."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from serve_app import adapters
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.environment import with_environment
from serve_app.errors import SettingsError
from serve_app.settings import OPEN_PUSHES, Inference, Settings
from serve_app.urls import is_loopback

from .app import deployment_names

BUILDER = "deployments.app:build"
#: Another's may stop the scaling of every app, should it fail.
POLICY = "deployments.scaling:Policy"

#: Keys and list positions from the top of the file.
Keys = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: the path of keys to it, and a sentence."""

    where: Keys
    what: str
    #: 1-based; 0 where the file could not be read.
    line: int = 0

    def __str__(self) -> str:
        line = f"line {self.line}: " if self.line else ""
        return f"{line}{'.'.join(map(str, self.where)) or 'the file'}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the app reads from a valid config file."""

    settings: Settings
    inference: Inference
    host: str
    port: int
    #: The app's name in Serve.
    app: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def load(path: Path) -> Config:
    """Raises SettingsError with every problem, one per line."""
    text = read(path)
    if isinstance(text, Problem):
        raise SettingsError(f"{path}:\n  {text}")
    return load_text(text, str(path))


def load_text(text: str, name: str) -> Config:
    """The config in `text`. Raises SettingsError with every problem, one per line, under this name."""
    problems = check_text(text)
    if problems:
        raise SettingsError(f"{name}:\n" + "\n".join(f"  {p}" for p in problems))
    raw = yaml.safe_load(text)
    app = raw["applications"][position(raw)]
    http = HTTPOptionsSchema.model_validate(raw["http_options"])
    settings = with_environment(Settings.model_validate(app["args"]))
    return Config(
        settings=settings,
        inference=Inference.model_validate(_user_config(app, settings)),
        host=http.host,
        port=http.port,
        app=app.get("name", ServeApplicationSchema.model_fields["name"].default),
    )


def position(raw: dict[str, Any]) -> int:
    """The index of this app in a valid file's `applications`."""
    return next(i for i, app in enumerate(raw["applications"]) if app.get("import_path") == BUILDER)


def check(path: Path) -> list[Problem]:
    """Every problem of the file, in file order. Serve and the app accept a file without problems."""
    text = read(path)
    return [text] if isinstance(text, Problem) else check_text(text)


def check_text(text: str) -> list[Problem]:
    """As `check`."""
    try:
        raw, lines = yaml.load(text, Loader=_OnceLoader), Lines(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        what = f"not YAML: {getattr(e, 'problem', None) or e}"
        return [Problem(where=(), what=what, line=mark.line + 1 if mark else 0)]
    if not isinstance(raw, dict):
        return [Problem(where=(), what="not a mapping", line=1)]
    problems = [Problem(where=where, what=what, line=lines.of(where)) for where, what in _problems(raw)]
    return sorted(problems, key=lambda p: p.line)


def read(path: Path) -> str | Problem:
    """The file's text, or why there is none."""
    try:
        return path.read_text()
    except OSError as e:
        return Problem(where=(), what=f"cannot be read: {e.strerror}")
    except UnicodeDecodeError as e:
        return Problem(where=(), what=f"not UTF-8: {e.reason} at byte {e.start}")


Found = Iterator[tuple[Keys, str]]


def _problems(raw: dict[str, Any]) -> Found:
    yield from _serve_problems(raw)
    apps = raw.get("applications")
    ours = [(i, app) for i, app in enumerate(_dicts(apps)) if app.get("import_path") == BUILDER]
    if len(ours) != 1:
        yield ("applications",), f"exactly one application must have import_path {BUILDER}; there are {len(ours)}"
    for i, app in ours:
        at: Keys = ("applications", i)
        yield from _app_problems(at, app)
        policy = app.get("autoscaling_policy")
        if isinstance(policy, dict) and (name := policy.get("policy_function")) != POLICY:
            yield (*at, "autoscaling_policy", "policy_function"), f"{name!r} is not {POLICY}"
        yield from _port_problems((*at, "args", "messages", "url"), app, raw.get("http_options"))
        yield from _host_problems(app, raw.get("http_options"))


def _serve_problems(raw: dict[str, Any]) -> Found:
    """Ray's own schema ignores unknown keys, so the names on each level are compared here."""
    yield from _unknown(ServeDeploySchema, raw, ())
    yield from _unknown(HTTPOptionsSchema, raw.get("http_options"), ("http_options",))
    grpc = raw.get("grpc_options")
    if isinstance(grpc, dict) and grpc.get("grpc_servicer_functions"):
        yield ("grpc_options",), "Serve's gRPC port is open to anyone, on every address; this app does not use it"
    for i, app in enumerate(_dicts(raw.get("applications"))):
        at: Keys = ("applications", i)
        yield from _unknown(ServeApplicationSchema, app, at)
        yield from _unknown(AutoscalingPolicy, app.get("autoscaling_policy"), (*at, "autoscaling_policy"))
        for j, deployment in enumerate(_dicts(app.get("deployments"))):
            yield from _deployment_problems((*at, "deployments", j), deployment)
    yield from _invalid(ServeDeploySchema, raw, ())


def _deployment_problems(at: Keys, deployment: dict[str, Any]) -> Found:
    yield from _unknown(DeploymentSchema, deployment, at)
    yield from _unknown(RayActorOptionsSchema, deployment.get("ray_actor_options"), (*at, "ray_actor_options"))
    autoscaling = deployment.get("autoscaling_config")
    if isinstance(autoscaling, dict):
        yield from _unknown(AutoscalingConfig, autoscaling, (*at, "autoscaling_config"))
        yield from _invalid(AutoscalingConfig, autoscaling, (*at, "autoscaling_config"))


def _app_problems(at: Keys, app: dict[str, Any]) -> Found:
    args = app.get("args", {})
    found = list(_invalid(Settings, args, (*at, "args")))
    yield from found
    if found:
        return
    settings = Settings.model_validate(args)
    names = deployment_names(settings)
    for j, deployment in enumerate(_dicts(app.get("deployments"))):
        if deployment.get("name") not in names:
            what = f"{deployment.get('name')!r} is not one of this app's deployments: {', '.join(names)}"
            yield (*at, "deployments", j, "name"), what
    yield from _url_problems((*at, "args"), settings)
    yield from _inference_problems(at, app, settings)


def _port_problems(at: Keys, app: dict[str, Any], http: Any) -> Found:
    args = app.get("args")
    messages = args.get("messages") if isinstance(args, dict) else None
    url = str(messages.get("url", "")) if isinstance(messages, dict) else ""
    port = http.get("port", 8000) if isinstance(http, dict) else 8000
    if url.startswith("embedded:") and url.endswith(f":{port}"):
        yield at, f"port {port} is already the HTTP port"


def _host_problems(app: dict[str, Any], http: Any) -> Found:
    host = http.get("host") if isinstance(http, dict) else None
    if not isinstance(host, str) or not host:
        yield ("http_options", "host"), "is required: without it Serve listens on every address"
    elif not is_loopback(host):
        with suppress(ValidationError):
            if Settings.model_validate(app.get("args", {})).push.is_open:
                yield ("http_options", "host"), f"strangers can reach {host}: {OPEN_PUSHES}"


def _url_problems(at: Keys, settings: Settings) -> Found:
    """Problems that the replicas would only find when they start."""
    for keys, url, table in (
        (("blobs",), settings.blobs, adapters.BLOB_STORES),
        (("jobs",), settings.jobs, adapters.JOB_STORES),
        (("sessions",), settings.sessions, adapters.JOB_STORES),
        (("messages", "url"), settings.messages.url, adapters.MESSAGE_SOURCES),
        (("weights", "mirror"), settings.weights.mirror, adapters.BLOB_STORES),
    ):
        scheme, colon, rest = (url or "").partition(":")
        if url is not None and not (colon and scheme in table):
            # An invalid scheme is not repeated: it may be a password.
            what = f"the scheme {scheme!r}" if colon and scheme.isidentifier() else "its scheme"
            yield (*at, *keys), f"{what} is not one of {', '.join(f'{name}:' for name in table)}"
        elif scheme == "memory":
            yield (*at, *keys), "memory: works within one process only, and every replica is a process of its own"
        elif scheme in ("files", "sqlite") and not rest:
            yield (*at, *keys), f"{url!r} has no path"
    if settings.messages.is_embedded:
        try:
            EmbeddedPubSub.of(settings.messages)
        except SettingsError as e:
            yield (*at, "messages", "url"), e.message


def _inference_problems(at: Keys, app: dict[str, Any], settings: Settings) -> Found:
    for j, deployment in enumerate(_dicts(app.get("deployments"))):
        if deployment.get("name") == "Ingress":
            at = (*at, "deployments", j, "user_config")
    user_config = _user_config(app, settings)
    found = list(_invalid(Inference, user_config, at))
    yield from found
    if not found and (variant := Inference.model_validate(user_config).variant) not in settings.variants:
        yield (*at, "variant"), f"{variant!r} is not served; the variants are {', '.join(settings.variants)}"


def _user_config(app: dict[str, Any], settings: Settings) -> Any:
    for deployment in _dicts(app.get("deployments")):
        if deployment.get("name") == "Ingress" and deployment.get("user_config") is not None:
            return deployment["user_config"]
    return {"variant": next(iter(settings.variants))}


def _dicts(value: Any) -> Sequence[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _unknown(model: type[BaseModel], value: Any, at: Keys) -> Found:
    if not isinstance(value, dict):
        return
    names = set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}
    for key in value:
        if key not in names:
            yield (*at, key), "unknown key"


def _invalid(model: type[BaseModel], value: Any, at: Keys) -> Found:
    try:
        model.model_validate(value)
    except ValidationError as e:
        for error in e.errors(include_url=False, include_context=False):
            what = "unknown key" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
            yield (*at, *error["loc"]), what


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that appears twice, where YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} appears twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Lines:
    """The line of each path of keys."""

    def __init__(self, text: str) -> None:
        self._root = yaml.compose(text, Loader=yaml.SafeLoader)

    def of(self, where: Iterable[str | int]) -> int:
        node, line = self._root, 1
        for part in where:
            step = _step(node, part)
            if step is None:
                break
            line, node = step
        return line


def _step(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None

"""Kubernetes manifests: the Serve configs that their RayServices carry, each checked as a config file is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from serve_app.settings import Settings

from .config import Lines, Problem, check_text, load_text, read

#: Port of Ray's metrics on every pod that KubeRay starts.
METRICS_PORT = 8080


@dataclass(frozen=True, kw_only=True)
class ServedConfig:
    """A RayService's `serveConfigV2`."""

    #: The RayService's.
    name: str
    text: str
    #: The line of the file that its key is on, 1-based.
    line: int
    #: Whether it is a YAML block, whose lines follow in the file; a quoted one has only the line of its key.
    is_block: bool

    def problems(self) -> list[Problem]:
        """With their lines in the file, 1-based."""
        found = check_text(self.text) or list(_in_cluster(self.text))
        keys = ("RayService", self.name, "spec", "serveConfigV2")
        return [replace(p, where=(*keys, *p.where), line=self.line + p.line * self.is_block) for p in found]


def check(path: Path) -> tuple[list[Problem], list[Settings]]:
    """Every problem of a config file, or of each RayService's config in a file of manifests, in file order; where there
    is none, the settings of each."""
    text = read(path)
    if isinstance(text, Problem):
        return [text], []
    if not _are_manifests(text):
        problems = check_text(text)
        return problems, [] if problems else [load_text(text, str(path)).settings]
    try:
        served = list(_served(text))
    except yaml.YAMLError as e:
        return [Problem(where=(), what=f"not YAML: {e}")], []
    if not served:
        return [Problem(where=(), what="no RayService among the manifests has a serveConfigV2")], []
    problems = [problem for config in served for problem in config.problems()]
    return problems, [] if problems else [load_text(config.text, config.name).settings for config in served]


def _are_manifests(text: str) -> bool:
    """Whether the first YAML document is a Kubernetes object."""
    try:
        first = next(iter(yaml.compose_all(text, Loader=yaml.SafeLoader)), None)
    except yaml.YAMLError:
        return False
    return {"apiVersion", "kind"} <= _children(first).keys()


def _served(text: str) -> Iterator[ServedConfig]:
    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        top = _children(document)
        config = _children(top.get("spec")).get("serveConfigV2")
        if _text(top.get("kind")) == "RayService" and isinstance(config, yaml.ScalarNode):
            name = _text(_children(top.get("metadata")).get("name"))
            line, is_block = config.start_mark.line + 1, config.style == "|"
            yield ServedConfig(name=name, text=config.value, line=line, is_block=is_block)


def _in_cluster(text: str) -> Iterator[Problem]:
    """What Serve and the app take, but KubeRay's pods do not."""
    raw, lines = yaml.safe_load(text), Lines(text)
    location = ("proxy_location",)
    if raw.get("proxy_location", "EveryNode") != "EveryNode":
        what = (
            "must be EveryNode: KubeRay's probes ask every pod for Serve's HTTP; without it workers never become ready"
        )
        yield Problem(where=location, what=what, line=lines.of(location))
    port = ("http_options", "port")
    if raw["http_options"].get("port") == METRICS_PORT:
        what = f"{METRICS_PORT} is the port of Ray's metrics on each pod"
        yield Problem(where=port, what=what, line=lines.of(port))


def _children(node: yaml.Node | None) -> dict[str, yaml.Node]:
    return {_text(key): value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def _text(node: yaml.Node | None) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""

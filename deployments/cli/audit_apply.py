"""What an audit recommends, written into a Serve config file: the file stays what the app is deployed from."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import unified_diff
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from serve_app.audit.record import AuditStatus
from serve_app.errors import AuditError, SettingsError
from serve_app.http.service import Readiness
from serve_app.parameters import GuidanceScale, RunId, Steps, VariantName
from serve_app.settings import Inference

from ..config import Config, check, load, position


class _Choice(BaseModel):
    variant: VariantName
    guidance_scale: GuidanceScale
    steps: Steps


class _Results(BaseModel):
    """What is read of results.json."""

    run_id: RunId
    status: AuditStatus
    recommended: _Choice | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    config: Path
    #: What edits use where their messages say nothing, by the file.
    before: Inference
    after: Inference
    #: Of the file's text, unified; empty where it says all of it already and was left alone.
    diff: str
    #: Of the variant; they come before the inference defaults.
    own_steps: int | None = None

    @property
    def next_step(self) -> str:
        """For a person: how what the file says reaches the app."""
        if not self.diff:
            return f"{self.config} says this already: nothing was changed.{self._other_steps}"
        return (
            f"Deploy it with: serve deploy {shlex.quote(str(self.config))}   (RAY_AUTH_MODE=token if Ray asks for it)\n"
            "Only user_config differs: it takes effect on the next claimed job, and nothing restarts. An app that runs "
            "in the foreground by `serve run` takes it the same way.\n"
            "With KubeRay, make the same change under spec.serveConfigV2 of the RayService and kubectl apply it: the "
            f"cluster stays, too.{self._other_steps}"
        )

    @property
    def _other_steps(self) -> str:
        if self.own_steps in (None, self.after.steps):
            return ""
        name = self.after.variant
        return (
            f"\nEdits on {name} still take {self.own_steps} steps, the variant's own default: for {self.after.steps}, "
            f"set steps in variants.{name}.definition, which redeploys."
        )


def apply(results: Mapping[str, Any], config: Path) -> Applied:
    """Write the recommended variant, guidance scale and steps into the `user_config` of the file's Ingress; the other
    data stay, as do comments, order, quotes and line ends. `results` is a run's results.json. Doing it again changes
    nothing.

    The file is replaced whole, and only by one that `config.check` finds sound.

    Raises AuditError for a run that is not over, failed, or recommends nothing; SettingsError for a file that is not
    sound, cannot be written, or does not serve the variant.
    """
    choice = _choice(results)
    before = load(config)
    if choice.variant not in before.settings.variants:
        served = ", ".join(before.settings.variants)
        raise SettingsError(f"{config}: the recommended variant {choice.variant} is not served; there are {served}")
    old = config.read_bytes().decode()
    new = _written(old, choice, config)
    if new != old:
        _replace(config, new)
    name, lines = str(config), [text.splitlines(keepends=True) for text in (old, new)]
    diff = "".join(unified_diff(lines[0], lines[1], name, name))
    after = before.inference.model_copy(update=choice.model_dump())
    own_steps = before.settings.variant(choice.variant).steps
    return Applied(config=config, before=before.inference, after=after, diff=diff, own_steps=own_steps)


def drift(config: Config, running: Mapping[str, Any]) -> list[str]:
    """What the running app has otherwise than the file, a sentence each, by the body of its `GET /ready`."""
    try:
        app = Readiness.model_validate(running)
    except ValidationError:
        return [f"what answers at {config.url}/ready is not this app"]
    named = config.settings.variants
    found = [f"{name} is in the file, and not served" for name in named if name not in app.variants]
    found += [f"{name} is served, and not in the file" for name in app.variants if name not in named]
    ours = config.inference.model_dump(mode="json")
    found += [
        f"{key} is {ours[key]} in the file, and {value} in the app"
        for key, value in app.defaults.items()
        if key in ours and value != ours[key]
    ]
    if app.defaults_error:
        found.append(f"the app refused its last defaults: {app.defaults_error}")
    return found


def _choice(results: Mapping[str, Any]) -> _Choice:
    try:
        run = _Results.model_validate(results)
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(map(str, error["loc"])) or "the whole"
        raise AuditError(f"this is not an audit's results.json: {where}: {error['msg']}") from e
    if run.status not in (AuditStatus.SUCCEEDED, AuditStatus.INCOMPLETE):
        raise AuditError(f"run {run.run_id} is {run.status}: there is nothing to apply", run_id=run.run_id)
    if run.recommended is None:
        raise AuditError(f"run {run.run_id} recommends nothing", run_id=run.run_id)
    return run.recommended


def _written(text: str, choice: _Choice, config: Path) -> str:
    wanted = choice.model_dump()
    expected = _parsed(text)
    _put(expected, wanted)
    if _parsed(text) == expected:
        return text
    with suppress(yaml.YAMLError, YAMLError):
        new = _edited(text, wanted)
        if _parsed(new) == expected:
            return new
    raise SettingsError(
        f"{config}: user_config cannot be set here without changing something else; set user_config of Ingress to "
        f"{wanted} by hand"
    )


def _parsed(text: str) -> Any:
    """The text's data as Ray reads it, with a copy in the place of each alias."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def _edited(text: str, wanted: Mapping[str, Any]) -> str:
    """The text with `wanted` in it, laid out as it was as far as ruamel.yaml can: with one indentation for all lists,
    and one for all mappings."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = sys.maxsize
    editor.explicit_start = re.search("^---", text, re.MULTILINE) is not None
    # Ray reads YAML 1.1, where 1e-05 is text; this is how PyYAML writes them.
    values = editor.load(yaml.safe_dump(wanted, sort_keys=False))
    data = editor.load(text.replace("\r\n", "\n"))
    apps = data["applications"]
    app = apps[position(data)]
    if not (apps.fa.flow_style() or app["args"].fa.flow_style()):
        editor.indent(mapping=app["args"].lc.col - app.lc.col, sequence=app.lc.col, offset=apps.lc.col)
    _put(data, values)
    editor.dump(data, out := StringIO())
    return out.getvalue().replace("\n", "\r\n" if "\r\n" in text else "\n")


def _put(raw: Any, wanted: Mapping[str, Any]) -> None:
    """All of `wanted` is written out, also what is the default: without a `user_config` the default variant is another
    than where one leaves it out."""
    app = raw["applications"][position(raw)]
    if not app.get("deployments"):
        app["deployments"] = []
    deployments = app["deployments"]
    ingress = next((one for one in deployments if one["name"] == "Ingress"), None)
    if ingress is None:
        ingress = {"name": "Ingress"}
        deployments.insert(0, ingress)
    if not ingress.get("user_config"):
        ingress["user_config"] = {}
    current = ingress["user_config"]
    for key, value in wanted.items():
        if key not in current and isinstance(current, CommentedMap):
            # Behind the last key may come comments that belong to what follows.
            current.insert(0, key, value)
        elif current.get(key) != value:
            current[key] = value


def _replace(config: Path, text: str) -> None:
    """Whole or not at all. A link stays one."""
    target = config.resolve()
    try:
        with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            part = Path(file.name)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            shutil.copymode(target, part)
            if problems := check(part):
                raise SettingsError(f"{config} would be wrong then, and stays: {'; '.join(map(str, problems))}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise SettingsError(f"{config} cannot be written: {e.strerror}") from e

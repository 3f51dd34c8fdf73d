"""Settings by the environment, under the names that another system's users have in their compose files."""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from .errors import SettingsError
from .models import BUILT_IN, Variant
from .settings import GeneratorSettings, Settings

#: The generator that their checkpoint becomes.
SDXL = "sdxl"

_SWITCH: Mapping[str, bool] = {"1": True, "true": True, "0": False, "false": False, "": False}
_NEW = GeneratorSettings()


def with_environment(settings: Settings, environ: Mapping[str, str] = os.environ) -> Settings:
    """`settings` as the environment has them, which goes before the file:

    - DF_FAKE_RUNNER=1: every generator draws a card in place of a picture, and there is one;
    - DF_GENERATE_MODEL_PATH, a checkpoint of SDXL, or DF_DEFAULT_MODEL_DIR, a folder in DF_MODELS_ROOT: it is the
      generator `sdxl`, and the default; a fake runner does not look at it;
    - DF_SMOKE=1: `api.smoke`.

    Raises SettingsError, which names the variable.
    """
    generators = dict(settings.generators)
    if _is_on("DF_FAKE_RUNNER", environ):
        fake = {"definition": Variant(family="fake")}
        generators = {name: one.model_copy(update=fake) for name, one in (generators or {"fake": _NEW}).items()}
    elif checkpoint := _checkpoint(environ):
        own = generators.pop(SDXL, _NEW)
        row = (own.definition or BUILT_IN[SDXL]).model_copy(update={"repo": None, "revision": None, **checkpoint})
        generators = {SDXL: own.model_copy(update={"definition": row}), **generators}
    api = settings.api.model_copy(update={"smoke": settings.api.smoke or _is_on("DF_SMOKE", environ)})
    changed = settings.model_copy(update={"generators": generators, "api": api})
    if changed == settings:
        return settings
    try:
        return Settings.model_validate(changed.model_dump())
    except ValidationError as e:
        raise SettingsError(f"the environment's DF_ variables: {e.errors()[0]['msg']}") from e


def _is_on(name: str, environ: Mapping[str, str]) -> bool:
    given = environ.get(name, "")
    if given.lower() not in _SWITCH:
        raise SettingsError(f"{name}: {given!r} is neither 1 nor 0")
    return _SWITCH[given.lower()]


def _checkpoint(environ: Mapping[str, str]) -> Mapping[str, str]:
    """`file`, and for a folder `base`; empty where none is named. A root alone names none."""
    root, folder = environ.get("DF_MODELS_ROOT"), environ.get("DF_DEFAULT_MODEL_DIR")
    if given := environ.get("DF_GENERATE_MODEL_PATH"):
        name, path = "DF_GENERATE_MODEL_PATH", Path(given).absolute()
    elif folder and root:
        name, path = "DF_DEFAULT_MODEL_DIR", Path(root, folder).absolute()
    elif folder:
        raise SettingsError("DF_DEFAULT_MODEL_DIR: it is a folder in DF_MODELS_ROOT, which is not set")
    else:
        return {}
    if path.is_file():
        return {"file": str(path)}
    if (path / "model_index.json").is_file():
        return {"file": str(path), "base": str(path)}
    what = "a folder without model_index.json" if path.is_dir() else "not there"
    raise SettingsError(f"{name}: {path} is {what}")

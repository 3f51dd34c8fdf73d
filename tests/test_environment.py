"""The environment of another system's users, over the settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from serve_app.environment import with_environment
from serve_app.errors import SettingsError
from serve_app.models import BUILT_IN
from serve_app.settings import Settings


def settings(**generators: Any) -> Settings:
    return Settings(variants={"telea": {}}, generators=generators)


def checkpoint(folder: Path) -> Path:
    file = folder / "own.safetensors"
    file.write_bytes(b"")
    return file


def test_an_empty_environment_changes_nothing() -> None:
    before = settings(fake={"num_cpus": 0.1})
    assert with_environment(before, {}) == with_environment(before, {"DF_SMOKE": "0", "DF_FAKE_RUNNER": ""}) == before
    assert with_environment(before, {"DF_MODELS_ROOT": "/models"}) == before


def test_a_checkpoint_is_the_generator_sdxl_and_the_default(tmp_path: Path) -> None:
    file = checkpoint(tmp_path)
    found = with_environment(settings(fake={}), {"DF_GENERATE_MODEL_PATH": str(file)})
    assert list(found.generators) == ["sdxl", "fake"]
    row = found.variant("sdxl")
    assert (row.repo, row.file, row.base) == (None, str(file), BUILT_IN["sdxl"].base)
    assert (row.family, row.num_gpus) == ("sdxl", 1)


def test_what_the_file_says_of_sdxl_beside_its_weights_stays(tmp_path: Path) -> None:
    on_cpu = {"family": "sdxl", "repo": "o/n", "file": "f", "base": "tiny:sdxl-base", "num_gpus": 0}
    own = {"max_replicas": 3, "definition": on_cpu}
    found = with_environment(settings(fake={}, sdxl=own), {"DF_GENERATE_MODEL_PATH": str(checkpoint(tmp_path))})
    assert list(found.generators) == ["sdxl", "fake"]
    row = found.variant("sdxl")
    assert (found.generators["sdxl"].max_replicas, row.base, row.num_gpus) == (3, "tiny:sdxl-base", 0)
    assert row.repo is None


def test_a_folder_of_the_models_root_is_a_whole_pipeline(tmp_path: Path) -> None:
    folder = tmp_path / "epic"
    folder.mkdir()
    environment = {"DF_MODELS_ROOT": str(tmp_path), "DF_DEFAULT_MODEL_DIR": "epic"}
    with pytest.raises(SettingsError, match=r"^DF_DEFAULT_MODEL_DIR: .*epic is a folder without model_index\.json$"):
        with_environment(settings(), environment)
    (folder / "model_index.json").write_text("{}")
    row = with_environment(settings(), environment).variant("sdxl")
    assert (row.file, row.base) == (str(folder), str(folder))
    # A developer's override, there and here.
    own = checkpoint(tmp_path)
    row = with_environment(settings(), {**environment, "DF_GENERATE_MODEL_PATH": str(own)}).variant("sdxl")
    assert row.file == str(own)


def test_a_fake_runner_stands_for_every_generator_and_needs_no_file() -> None:
    environment = {"DF_FAKE_RUNNER": "1", "DF_SMOKE": "1", "DF_GENERATE_MODEL_PATH": "/nowhere/epic.safetensors"}
    found = with_environment(settings(sdxl={"num_cpus": 0.1}, fake={}), environment)
    assert [found.variant(name).family for name in found.generators] == ["fake", "fake"]
    assert (found.generators["sdxl"].num_cpus, found.variant("sdxl").num_gpus, found.api.smoke) == (0.1, 0, True)
    assert list(with_environment(settings(), environment).generators) == ["fake"]
    assert not with_environment(settings(), {"DF_FAKE_RUNNER": "1"}).api.smoke


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"DF_FAKE_RUNNER": "perhaps"}, r"^DF_FAKE_RUNNER: 'perhaps' is neither 1 nor 0$"),
        ({"DF_SMOKE": "2"}, "^DF_SMOKE: '2' is neither"),
        ({"DF_GENERATE_MODEL_PATH": "/nowhere/epic"}, "^DF_GENERATE_MODEL_PATH: /nowhere/epic is not there$"),
        ({"DF_DEFAULT_MODEL_DIR": "epic"}, "^DF_DEFAULT_MODEL_DIR: .*DF_MODELS_ROOT, which is not set$"),
        ({"DF_DEFAULT_MODEL_DIR": "epic", "DF_MODELS_ROOT": "/nowhere"}, "/nowhere/epic is not there$"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_its_name(environment: Mapping[str, str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        with_environment(settings(), environment)


def test_a_checkpoint_among_users_pictures_is_refused(tmp_path: Path) -> None:
    mine = settings().model_copy(update={"blobs": f"files:{tmp_path}"})
    with pytest.raises(SettingsError, match="shares a folder with blobs"):
        with_environment(mine, {"DF_GENERATE_MODEL_PATH": str(checkpoint(tmp_path))})

import subprocess
import sys
from typing import get_args

import pytest

from serve_app.engine import families, flux
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.weights.fetch import Weights
from serve_app.errors import VariantLoadFailed
from serve_app.models import BUILT_IN, Family, Variant
from serve_app.settings import VariantSettings


def test_every_family_has_its_engine(tiny: TinyWeights) -> None:
    assert set(families.FAMILIES) == set(get_args(Family))
    weights = Weights(tiny.transformer("flux1-fill-dev-Q4_0.gguf"), tiny.base)
    made = {
        family: families.create("v", Variant(family=family), weights, VariantSettings()) for family in families.FAMILIES
    }
    assert {family: type(made_engine).__name__ for family, made_engine in made.items()} == {
        "flux-fill": "FluxFill",
        "flux2-klein": "Klein",
        "telea": "Telea",
        "pause": "Pause",
        "sdxl": "Sdxl",
        "flux": "FluxDev",
        "fake": "Fake",
    }


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fill", "pipeline"):
        monkeypatch.delitem(sys.modules, f"serve_app.engine.flux.{module}", raising=False)
        monkeypatch.delattr(flux, module, raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        VariantLoadFailed, match=r"tiny-Q4_0.*needs the package diffusers.*flux-fill-serve\[diffusion\]"
    ):
        families.create("tiny-Q4_0", BUILT_IN["tiny-Q4_0"], None, VariantSettings())


@pytest.mark.parametrize("name", ["telea", "fake"])
def test_some_need_none_of_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for package in ("torch", "diffusers", "transformers", "gguf", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    assert type(families.create(name, BUILT_IN[name], None, VariantSettings())).__name__.lower() == name


def test_what_a_cpu_ingress_imports_brings_no_torch() -> None:
    code = "import serve_app.engine.generating, serve_app.engine.families, serve_app.engine.prompts, sys\n"
    code += "print([n for n in ('torch', 'diffusers', 'transformers', 'huggingface_hub') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

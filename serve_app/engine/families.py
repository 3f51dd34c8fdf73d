"""Engine families by name, imported on first use: a replica pays only for its own."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import VariantLoadFailed
from ..models import Family, Variant
from ..settings import VariantSettings
from . import Engine, Generator
from .weights.fetch import Weights

if TYPE_CHECKING:
    from .fake import Fake
    from .flux.dev import FluxDev
    from .flux.fill import FluxFill
    from .flux2.klein import Klein
    from .pause import Pause
    from .sdxl.generator import Sdxl
    from .telea import Telea

    # The type checker's proof of what `create` only says.
    _ENGINES: tuple[type[Engine], ...] = (FluxFill, Klein, Telea, Pause)
    _GENERATORS: tuple[type[Generator], ...] = (Sdxl, FluxDev, Fake)

#: Family -> module in this package and class; the class takes (variant, weights, served).
FAMILIES: Mapping[Family, str] = {
    "flux-fill": "flux.fill:FluxFill",
    "flux2-klein": "flux2.klein:Klein",
    "telea": "telea:Telea",
    "pause": "pause:Pause",
    "flux": "flux.dev:FluxDev",
    "sdxl": "sdxl.generator:Sdxl",
    "fake": "fake:Fake",
}

#: Family -> the pip extra that it needs.
_EXTRAS: Mapping[Family, str] = dict.fromkeys(("flux-fill", "flux2-klein", "sdxl", "flux"), "diffusion")


def create(name: str, variant: Variant, weights: Weights | None, served: VariantSettings) -> Any:
    """The Engine of the variant called `name`, or its Generator where `variant.generation` says so, not loaded yet.
    `weights` as `weights.fetch` gave them.

    Raises VariantLoadFailed, which names the pip extra, where the family's packages are not installed.
    """
    module, _, kind = FAMILIES[variant.family].partition(":")
    try:
        engine = getattr(import_module(f"{__package__}.{module}"), kind)
    except ModuleNotFoundError as e:
        extra = _EXTRAS.get(variant.family)
        hint = f": pip install 'flux-fill-serve[{extra}]'" if extra else ""
        message = f"variant {name}: the family {variant.family} needs the package {e.name}{hint}"
        raise VariantLoadFailed(message, variant=name, extra=extra) from e
    return engine(variant, weights, served)

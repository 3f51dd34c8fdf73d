"""Which of an audit's variants are painted side by side, and how many replicas each may be expected to have. Pure.

A served variant with `min_replicas` keeps its GPUs for ever. What is left is shared by the audited variants that come
and go: all of them at once where each can have one, otherwise as many at a time as there are free GPUs, and each such
wave begins when the one before has given its GPUs back, and whatever else of the app may take them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import AuditImpossible, UnknownVariant
from ..settings import Scaling, Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    #: Variant -> replicas that it may be expected to have, at least 1.
    wanted: Mapping[str, int]
    #: Whether GPUs must be free first that an earlier wave, or something else of the app, may have taken.
    waits: bool = False
    #: Of which Serve would start more, if more were asked for: on GPUs that are another's.
    growing: frozenset[str] = frozenset()


def plan(cells: Mapping[str, int], settings: Settings, gpus: int) -> list[Wave]:
    """Waves that paint `cells`: variant -> how many of it, at least one. `gpus` are those that the cluster can have.

    Variants that need no waiting for, on the CPU or with replicas that never go, are in the first wave. Raises
    UnknownVariant; AuditImpossible where a variant's replica can never start.
    """
    if unknown := [name for name in cells if name not in settings.variants]:
        served = ", ".join(settings.variants)
        raise UnknownVariant(f"{', '.join(unknown)}: not served here; there are {served}", variants=unknown)
    kept = kept_gpus(settings)
    passing = [name for name in cells if _comes_and_goes(name, settings)]
    free = gpus - sum(kept.values())
    if any(settings.variant(name).num_gpus for name in cells):
        _check_gpus(passing, kept, gpus)
    # What others than these variants may take beyond the GPUs that they keep.
    others = [one for name, one in gpu_holders(settings).items() if name not in cells]
    is_roomy = not passing or len(passing) <= free - sum(one.max_replicas - one.min_replicas for one in others)
    groups = [list(cells)]
    if not is_roomy:
        staying = [name for name in cells if name not in passing]
        groups = [staying, *(passing[at : at + free] for at in range(0, len(passing), free))]
    waves = []
    for group in filter(None, groups):
        wanted = _wanted(group, cells, settings, free)
        growing = frozenset(name for name, count in wanted.items() if count < settings.variants[name].max_replicas)
        waves.append(Wave(wanted=wanted, waits=not is_roomy and group[0] in passing, growing=growing))
    return waves


def text_encoders(settings: Settings) -> dict[str, str]:
    """Base model -> what its text encoder is called, here and in `Replicas.counts`."""
    rows = map(settings.variant, settings.variants)
    bases = sorted({str(row.base) for row in rows if row.takes_prompt})
    return {base: f"the text encoder of {base}" for base in bases}


def gpu_holders(settings: Settings) -> dict[str, Scaling]:
    """Everything of the app whose replicas take a GPU each, by what it is called."""
    holders: dict[str, Scaling] = {
        name: served for name, served in settings.variants.items() if settings.variant(name).num_gpus
    }
    encoder = settings.text_encoder
    return holders | (dict.fromkeys(text_encoders(settings).values(), encoder) if encoder.num_gpus else {})


def kept_gpus(settings: Settings) -> dict[str, int]:
    """GPUs that never become free, by what holds them."""
    return {name: one.min_replicas for name, one in gpu_holders(settings).items() if one.min_replicas}


def _comes_and_goes(name: str, settings: Settings) -> bool:
    return settings.variant(name).num_gpus > 0 and not settings.variants[name].min_replicas


def _check_gpus(passing: Sequence[str], kept: Mapping[str, int], gpus: int) -> None:
    """Raises AuditImpossible, which names what holds the GPUs."""
    there, more = f"{gpus} GPU{'s' * (gpus != 1)}", "give `audit.gpus` where it can have more"
    if not gpus:
        raise AuditImpossible(f"the cluster has no GPU, and the audited variants want one each; {more}", gpus=gpus)
    holders = " and ".join(f"{name} keeps {count} (min_replicas {count})" for name, count in kept.items())
    if sum(kept.values()) > gpus:
        raise AuditImpossible(f"{holders} are more than the cluster's {there}; {more}", gpus=gpus)
    if passing and sum(kept.values()) == gpus:
        what = f"of the cluster's {there}, {holders}, so {', '.join(passing)} can never start"
        raise AuditImpossible(f"{what}; set min_replicas to 0 for the time of the audit, or {more}", gpus=gpus)


def _wanted(group: Sequence[str], cells: Mapping[str, int], settings: Settings, free: int) -> dict[str, int]:
    """What is left of `free` when each has one goes, one by one, to who has most cells for each replica."""
    served = settings.variants
    most = {name: min(served[name].max_replicas, cells[name]) for name in group}
    on_gpu = [name for name in group if settings.variant(name).num_gpus]
    wanted = most | {name: min(most[name], max(1, served[name].min_replicas)) for name in on_gpu}
    free -= sum(_comes_and_goes(name, settings) for name in group)
    for _ in range(free):
        growing = [name for name in on_gpu if wanted[name] < most[name]]
        if not growing:
            break
        wanted[max(growing, key=lambda name: cells[name] / wanted[name])] += 1
    return wanted

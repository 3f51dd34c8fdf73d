"""Waves that fit the GPUs, and what holds them where none can."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.audit.waves import Wave, gpu_holders, kept_gpus, plan
from serve_app.errors import AuditImpossible, UnknownVariant
from serve_app.settings import Settings


def gpu(low: int = 0, high: int = 1) -> dict[str, Any]:
    return {"definition": {"family": "telea", "num_gpus": 1}, "min_replicas": low, "max_replicas": high}


def cpu(high: int = 1) -> dict[str, Any]:
    return {"definition": {"family": "telea"}, "max_replicas": high}


def served(**variants: Any) -> Settings:
    return Settings(variants=variants)


def planned(settings: Settings, gpus: int, **cells: int) -> list[tuple[dict[str, int], bool]]:
    return [(dict(wave.wanted), wave.waits) for wave in plan(cells, settings, gpus)]


THREE = served(a=gpu(), b=gpu(), c=gpu())

TABLE = [
    ("one after the other on one GPU", THREE, 1, [({"a": 1}, True), ({"b": 1}, True), ({"c": 1}, True)]),
    ("two at a time on two", THREE, 2, [({"a": 1, "b": 1}, True), ({"c": 1}, True)]),
    ("all at once on three", THREE, 3, [({"a": 1, "b": 1, "c": 1}, False)]),
    (
        "GPUs left over go to whom max_replicas lets have them",
        served(a=gpu(0, 9), b=gpu(0, 2), c=gpu()),
        9,
        [({"a": 5, "b": 2, "c": 1}, False)],
    ),
    (
        "one of two GPUs is kept",
        served(a=gpu(), b=gpu(), c=gpu(1, 1)),
        2,
        [({"c": 1}, False), ({"a": 1}, True), ({"b": 1}, True)],
    ),
    ("what is kept is enough", served(a=gpu(1, 1), b=gpu(1, 1), c=gpu(1, 1)), 3, [({"a": 1, "b": 1, "c": 1}, False)]),
    ("a kept one may grow", served(a=gpu(1, 4), b=gpu(), c=gpu()), 5, [({"a": 3, "b": 1, "c": 1}, False)]),
    ("CPU variants are side by side", served(a=cpu(3), b=cpu(), c=cpu()), 0, [({"a": 3, "b": 1, "c": 1}, False)]),
    (
        "the CPU needs no waiting",
        served(a=gpu(), b=cpu(), c=gpu()),
        1,
        [({"b": 1}, False), ({"a": 1}, True), ({"c": 1}, True)],
    ),
]


@pytest.mark.parametrize(("settings", "gpus", "waves"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_waves(settings: Settings, gpus: int, waves: list[Any]) -> None:
    assert planned(settings, gpus, a=5, b=5, c=5) == waves


def test_no_more_replicas_than_cells() -> None:
    assert planned(served(a=gpu(0, 9), b=cpu(9)), 9, a=2, b=3) == [({"a": 2, "b": 3}, False)]


def test_variants_of_which_serve_would_start_too_many_are_known() -> None:
    (wave,) = plan({"a": 5, "b": 5}, served(a=gpu(0, 3), b=gpu(0, 1)), 3)
    assert wave.wanted == {"a": 2, "b": 1}
    assert wave.growing == {"a"}


def test_a_variant_that_is_painted_already_takes_no_part() -> None:
    """But that production, or an earlier attempt, may have its GPU still."""
    assert planned(THREE, 1, b=1) == [({"b": 1}, True)]
    assert planned(THREE, 1) == []


BESIDE = served(a=gpu(), b=cpu(), others=gpu(0, 2))


@pytest.mark.parametrize(
    ("gpus", "waves"), [(1, [({"b": 1}, False), ({"a": 1}, True)]), (3, [({"a": 1, "b": 1}, False)])]
)
def test_gpus_are_waited_for_that_a_variant_outside_the_matrix_may_take(gpus: int, waves: list[Any]) -> None:
    assert planned(BESIDE, gpus, a=2, b=2) == waves


@pytest.mark.parametrize(("gpus", "waits"), [(1, True), (2, False)])
def test_a_text_encoder_on_a_gpu_that_comes_and_goes_is_waited_for(gpus: int, waits: bool) -> None:
    settings = Settings(variants={"Q4_0": {}}, text_encoder={"num_gpus": 1})
    assert planned(settings, gpus, Q4_0=1) == [({"Q4_0": 1}, waits)]
    assert sorted(gpu_holders(settings)) == ["Q4_0", "the text encoder of black-forest-labs/FLUX.1-Fill-dev"]


def test_a_variant_that_is_not_audited_keeps_its_gpus() -> None:
    settings = served(a=gpu(0, 9), held=gpu(2, 3))
    assert planned(settings, 4, a=9) == [({"a": 2}, False)]


HELD = served(a=gpu(), b=gpu(), c=gpu(), held=gpu(1, 1))
ONE_HELD = served(a=gpu(1, 1), b=gpu(), c=cpu())
TWO_HELD = served(a=gpu(1, 1), b=gpu(1, 1), c=cpu())
REFUSED = [
    ("no GPU", THREE, 0, ["no GPU", "audit.gpus"]),
    ("an unaudited variant holds the only one", HELD, 1, ["held keeps 1 (min_replicas 1)", "a, b, c can never start"]),
    ("an audited variant holds the only one", ONE_HELD, 1, ["a keeps 1", "1 GPU", "b can never start", "audit.gpus"]),
    ("more are kept than there are", TWO_HELD, 1, ["a keeps 1", "b keeps 1", "more than"]),
]


@pytest.mark.parametrize(("settings", "gpus", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_can_never_be_is_refused_and_says_what_holds_the_gpus(
    settings: Settings, gpus: int, words: list[str]
) -> None:
    with pytest.raises(AuditImpossible) as refused:
        plan({"a": 1, "b": 1, "c": 1}, settings, gpus)
    assert [word for word in words if word not in refused.value.message] == []


def test_kept_gpus_do_not_hinder_cpu_variants() -> None:
    assert planned(served(a=cpu(), held=gpu(1, 1)), 0, a=1) == [({"a": 1}, False)]


def test_a_text_encoder_on_a_gpu_keeps_it() -> None:
    settings = Settings(variants={"Q4_0": {}}, text_encoder={"num_gpus": 1, "min_replicas": 1})
    assert kept_gpus(settings) == {"the text encoder of black-forest-labs/FLUX.1-Fill-dev": 1}
    with pytest.raises(AuditImpossible, match=r"text encoder of .* keeps 1"):
        plan({"Q4_0": 1}, settings, 1)


def test_a_variant_that_is_not_served_is_named() -> None:
    with pytest.raises(UnknownVariant, match=r"nobody: not served here; there are a, b, c"):
        plan({"a": 1, "nobody": 1}, THREE, 3)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Settings, dict[str, int], int]:
    """Served variants, the cells of some of them, and GPUs."""
    variants, cells = {}, {}
    for name in draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True)):
        low = draw(st.integers(0, 2))
        high = draw(st.integers(max(low, 1), 5))
        variants[name] = gpu(low, high) if draw(st.booleans()) else cpu(high)
        if draw(st.booleans()):
            cells[name] = draw(st.integers(1, 8))
    return Settings(variants=variants), cells, draw(st.integers(0, 8))


def taken(wave: Wave, settings: Settings) -> int:
    """GPUs that are taken while the wave is painted, by it and by what never goes."""
    kept = kept_gpus(settings)
    own = {name: count for name, count in wave.wanted.items() if settings.variant(name).num_gpus}
    return sum(max(kept.get(name, 0), own.get(name, 0)) for name in {**kept, **own})


@given(clusters())
def test_every_wave_fits(cluster: tuple[Settings, dict[str, int], int]) -> None:
    settings, cells, gpus = cluster
    try:
        waves = plan(cells, settings, gpus)
    except AuditImpossible:
        assert any(settings.variant(name).num_gpus for name in cells)
        return
    on_gpu = [name for name in cells if settings.variant(name).num_gpus]
    assert sorted(name for wave in waves for name in wave.wanted) == sorted(cells)
    for wave in waves:
        assert not on_gpu or taken(wave, settings) <= gpus
        assert all(1 <= n <= min(cells[v], settings.variants[v].max_replicas) for v, n in wave.wanted.items())
    most = sum(settings.variants[name].max_replicas for name in gpu_holders(settings) if name not in cells)
    assert not any(wave.waits for wave in waves) or len(waves) > 1 or taken(waves[0], settings) + most > gpus


@given(clusters())
def test_a_wave_that_waits_holds_only_variants_that_come_and_go(cluster: tuple[Settings, dict[str, int], int]) -> None:
    settings, cells, gpus = cluster
    try:
        waves = plan(cells, settings, gpus)
    except AuditImpossible:
        return
    for wave in waves:
        comes_and_goes = [
            n for n in wave.wanted if settings.variant(n).num_gpus and not settings.variants[n].min_replicas
        ]
        assert not wave.waits or len(comes_and_goes) == len(wave.wanted)
    assert all(wave.waits for wave in waves[1:])

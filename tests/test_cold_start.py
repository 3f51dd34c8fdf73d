"""What the parts of a cold start took, and who is told."""

import asyncio
import json
import logging
from pathlib import Path

import pytest

from deployments.loading import Loading
from deployments.replica import open_engine
from serve_app.engine import cold_start
from serve_app.engine.cold_start import Part, recorded, timed
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.settings import Settings
from serve_app.telemetry import JsonFormatter

from .rig import Counters


def test_a_part_within_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 7.0, 10.0])
    monkeypatch.setattr(cold_start, "perf_counter", lambda: next(clock))
    with recorded() as parts, timed("fetch"):
        with timed("verify", 100):
            pass
        with timed("verify", 50):
            pass
    assert parts == {"verify": Part(5.0, 150), "fetch": Part(5.0)}


def test_bytes_make_a_rate() -> None:
    assert Part(2.0, 5_000_000_000).as_dict() == {"seconds": 2.0, "gb": 5.0, "gb_per_s": 2.5}
    assert Part(2.0).as_dict() == {"seconds": 2.0}


def test_a_part_that_fails_is_timed_and_its_error_passes() -> None:
    with recorded() as parts, pytest.raises(OSError, match="disk"), timed("read") as part:
        part.bytes += 7
        raise OSError("disk")
    assert parts["read"].bytes == 7


def test_parts_are_timed_where_nobody_records() -> None:
    with timed("read") as part:
        pass
    with recorded() as parts:
        pass
    assert (part.seconds, parts) == (0.0, {})


async def test_what_asyncio_runs_in_a_thread_is_recorded() -> None:
    def read() -> None:
        with timed("read", 3):
            pass

    with recorded() as parts:
        await asyncio.to_thread(read)
    assert parts["read"].bytes == 3


def flux_settings(tiny: TinyWeights, cache: Path) -> Settings:
    definition = {
        "family": "flux-fill",
        "file": str(tiny.transformer("flux1-fill-dev-Q4_0.gguf")),
        "base": str(tiny.base),
        "max_prompt_tokens": 16,
    }
    return Settings.model_validate(
        {
            "variants": {"v": {"definition": definition}},
            "windows": {"buckets": [[128, 128]]},
            "weights": {"cache": str(cache), "lock": str(cache / "none.json")},
        }
    )


@pytest.mark.slow
async def test_a_load_reports_its_parts_to_the_log_the_metrics_and_whoever_asks(
    tiny: TinyWeights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counters, settings = Counters(), flux_settings(tiny, tmp_path)
    with caplog.at_level(logging.INFO):
        loading = Loading("variant v", lambda: open_engine("v", settings), lambda engine: engine.close(), counters)
    await loading.close()
    assert list(loading.parts) == ["fetch", "import", "read", "build", "vae", "to_device", "adaln", "warm_up"]
    assert set(loading.parts["read"]) == {"seconds", "gb", "gb_per_s"}
    (line,) = [record for record in caplog.records if getattr(record, "action", "") == "loaded"]
    assert json.loads(JsonFormatter().format(line))["parts"] == loading.parts
    for part in loading.parts:
        assert len(counters.values["fluxfill_load_seconds", "variant v", part]) == 1

"""`fluxfill audit` as a user meets it: a real store, and in place of Ray jobs that run in this process."""

import asyncio
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deployments.audit_job import RayJobs
from deployments.cli import audit_client, audit_screen, audits, main
from deployments.cli.audit_demo import PART, sample, window_sizes
from deployments.client import Client
from deployments.config import load
from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.audit.record import (
    PAGE,
    REPORT,
    RESULTS,
    TABLE,
    Audit,
    AuditFault,
    AuditStatus,
    CellProgress,
    CellResult,
    Compared,
    CompileVerdict,
    Recommendation,
    folder,
    image_path,
)
from serve_app.audit.report import results
from serve_app.audit.store import AuditStore
from serve_app.edit.session import INPUTS, session_path
from serve_app.errors import UnknownAudit
from serve_app.http.service import Readiness, VariantReadiness
from serve_app.models import Trial
from serve_app.parameters import AuditRequest, Cell
from serve_app.settings import Settings

from .audit_jobs import Driver, LocalJobs
from .backends import make_job, until
from .rig import jpeg, line_mask, photo, png
from .test_cli import SOUND, Command, Ended, settings_in, write_config

Job = Callable[[Driver], Awaitable[None]]


def cell_result(name: str, cell: Cell, *, wall_s: float = 1.0, ssim: float = 0.9) -> CellResult:
    trial = Trial(wall_s=wall_s, gpu_ms=None, stages={"denoise_s": wall_s}, peak_bytes=None, reserved_bytes=None)
    compared = Compared(psnr_db=30.0, ssim=ssim, mae=2.0, outside_max=0, seam_gradient_ratio=1.0, seam_colour_shift=1.0)
    return CellResult(
        name=name,
        cell=cell,
        status="succeeded",
        trials=(trial, trial, trial),
        wall_s=wall_s,
        first_wall_s=2 * wall_s,
        compared=compared,
    )


async def painted(driver: Driver, guidances: int = 99, **figures: float) -> list[CellResult]:
    """Every cell stored with a picture, one after another; of the first so many guidance scales."""
    matrix, done = driver.audit.request.matrix, []
    for cell in matrix.cells():
        if cell.guidance_scale in matrix.guidance_scales[:guidances]:
            done.append(cell_result(matrix.name(cell), cell, **figures))
            await driver.files.keep_image(done[-1].name, png(photo()))
            await driver.files.keep_cell(done[-1])
    progress = {one.name: CellProgress(status="succeeded", step=8, steps=8) for one in done}
    await driver.note(cells={**driver.audit.cells, **progress}, stage="painting")
    return done


def done_job(blobs_url: str, **figures: float) -> Job:
    """A job that paints every cell and writes a report."""

    async def work(driver: Driver) -> None:
        await driver.begin()
        done = await painted(driver, **figures)
        best = Recommendation(variant="tiny-Q4_0", guidance_scale=4.0, steps=8, reasons=("it is small",), pareto=())
        verdict = CompileVerdict(variant="tiny-Q4_0", viable=True, verdict="proceed")
        await driver.note(recommended=best, compile=(verdict,), gpu="CPU", sm="N/A")
        audit = await driver.store.get(driver.audit.id)
        ended = audit.model_copy(update={"status": AuditStatus.SUCCEEDED})
        files = {
            PAGE: b"<!doctype html>",
            REPORT: b"# report",
            TABLE: b"variant\n",
            RESULTS: results.as_json(results.document(ended, done, {})),
        }
        blobs = adapters.blob_store(blobs_url)
        for name, data in files.items():
            await blobs.put(f"{folder(audit.id)}/{name}", data, content_type="text/plain")
        await driver.finish(AuditStatus.SUCCEEDED)

    return work


@dataclass
class Bench:
    """A config with a session in its store, and where jobs go."""

    config: Path
    settings: Settings
    store: AuditStore
    jobs: LocalJobs
    fluxfill: Command

    def does(self, job: Job) -> None:
        """What the runs' jobs do."""
        self.jobs.work = lambda audit: job(self.driver(audit))

    def driver(self, audit: Audit) -> Driver:
        return Driver(self.store, adapters.blob_store(self.settings.blobs), audit)

    def audit(self, *options: object) -> Ended:
        return self.fluxfill("audit", "-c", self.config, *options)

    def start(self, *options: object) -> Ended:
        return self.audit("--user", "u", "--session", "s", *options)

    def get(self, run_id: str) -> Audit:
        return asyncio.run(self.store.get(run_id))

    def sub(self, command: str, *arguments: object) -> Ended:
        return self.fluxfill("audit", command, *arguments, "-c", self.config)


@pytest.fixture
def fluxfill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The console script, in this process."""
    for console in (audit_screen.out, audit_screen.err, main.err):
        monkeypatch.setattr(console, "width", 300)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fluxfill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        screen = capsys.readouterr()
        return Ended(int(ended.value.code or 0), screen.out, screen.err)

    return run


@pytest.fixture
def bench(tmp_path: Path, fluxfill: Command, monkeypatch: pytest.MonkeyPatch) -> Bench:
    matrix = {"variants": ["tiny-Q4_0", "tiny-Q8_0"], "guidance_scales": [2.0, 4.0], "steps": [8]}
    config = write_config(tmp_path, audit={"matrix": matrix, "link_hours": 5})
    # Where nobody listens.
    config.write_text(config.read_text().replace("port: 8000", f"port: {free_port()}"))
    settings = settings_in(config)
    blobs = adapters.blob_store(settings.blobs)
    for name, data in ((INPUTS["original"], jpeg(photo())), (INPUTS["mask"], png(line_mask()))):
        asyncio.run(blobs.put(session_path("u", "s", name), data, content_type="image/png"))
    store, jobs = AuditStore(adapters.job_store(settings.jobs), blobs), LocalJobs()
    monkeypatch.setattr(audits, "_launcher", lambda address, config: jobs)
    monkeypatch.setattr(audit_client, "POLL_S", 0.01)
    monkeypatch.setattr(audit_client, "JOB_EVERY", 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    bench = Bench(config, settings, store, jobs, fluxfill)
    bench.does(done_job(settings.blobs))
    return bench


# -- start and follow


def test_a_run_is_started_followed_and_its_report_named(bench: Bench) -> None:
    ended = bench.start("--run-id", "first")
    assert (ended.status, ended.err) == (0, "")
    audit = bench.get("first")
    assert audit.status == AuditStatus.SUCCEEDED
    told = ("run first, 4 cells", "4/4 cells", "tiny-Q4_0, guidance 4, 8 steps", f"report: {folder('first')}/{PAGE}")
    assert [one for one in told if one not in ended.out] == []
    assert audit.request == AuditRequest(user_id="u", session_id="s", matrix=bench.settings.audit.matrix, link_hours=5)


@pytest.mark.slow
def test_the_axes_are_those_that_are_given(bench: Bench) -> None:
    more = ("--variants", "tiny-Q5_K_S,telea", "--guidance", "2.5, 30", "--steps", "4,8", "--seeds", "0,7")
    others = (
        "--prompt",
        "grass, wet",
        "--prompt",
        "sand",
        "--crop",
        "crop,auto",
        "--mask-grow",
        "0.02,0",
        "--reference",
        "tiny-Q5_K_S",
    )
    rest = ("--runs", 3, "--compile", "none", "--link-hours", 1.5, "--price-per-hour", 0.7, "--gpus", 2)
    assert bench.start("--run-id", "axes", *more, *others, *rest).status == 0
    assert bench.get("axes").request.model_dump(mode="json", exclude={"budget", "type"}) == {
        "user_id": "u",
        "session_id": "s",
        "matrix": {
            "variants": ["tiny-Q5_K_S", "telea"],
            "guidance_scales": [2.5, 30.0],
            "steps": [4, 8],
            "seeds": [0, 7],
            "prompts": ["grass, wet", "sand"],
            "crops": ["crop", "auto"],
            "mask_grows": [0.02, 0.0],
        },
        "reference": "tiny-Q5_K_S",
        "runs": 3,
        "compile_variants": [],
        "link_hours": 1.5,
        "price_per_hour": 0.7,
        "gpus": 2,
    }


def test_the_link_is_shown_to_a_person_and_to_no_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "http" not in bench.start("--run-id", "logged").out
    monkeypatch.setattr(audit_screen.out, "_force_terminal", True)
    shown = bench.sub("show", "logged").out
    local = adapters.local_links(bench.settings)
    found = re.search(r"http://\S+", shown)
    assert local is not None and found is not None
    assert local.path_of(found[0].rpartition("/")[2]) == f"{folder('logged')}/{PAGE}"


def test_a_terminal_has_a_bar_for_each_variant(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_screen.out, "_force_terminal", True)
    shown = bench.start().out
    assert re.search(r"tiny-Q4_0 .*2/2", shown) and re.search(r"tiny-Q8_0 .*2/2", shown)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--guidance", "nan"), "matrix.guidance_scales.0"),
        (("--guidance", "high"), "--guidance"),
        (("--steps", "0"), "matrix.steps.0"),
        (("--steps", "8,8"), "a value is given twice"),
        (("--seeds", "-1"), "matrix.seeds.0"),
        (("--crop", "zoom"), "--crop"),
        (("--reference", "telea"), "telea is not among the matrix's variants"),
        (("--runs", "1"), "runs"),
        (("--link-hours", "169"), "link_hours"),
        (("--run-id", "../x"), "--run-id"),
        (("--variants", "Q9"), "Q9 is not served here"),
        (("--session", "none"), "missing_input: users/u/sessions/none/"),
        (("--session", ".."), "session_id"),
        (("--resume", "r"), "--resume goes on with a run"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_started(bench: Bench, options: tuple[str, ...], told: str) -> None:
    ended = bench.start(*options)
    assert ended.status in (1, 2)
    assert told in ended.err
    assert asyncio.run(bench.store.list()) == [] and bench.jobs.tasks == {}


def test_a_session_must_be_named(bench: Bench) -> None:
    assert "name --user and --session" in bench.audit("--user", "u").err


def test_a_run_whose_job_cannot_be_started_is_over(bench: Bench) -> None:
    bench.jobs.is_down = True
    ended = bench.start("--run-id", "r")
    assert (ended.status, ended.err) == (
        1,
        "jobs_unavailable: switched off; r has failed, and can be resumed\n",
    )
    audit = bench.get("r")
    assert audit.status == AuditStatus.FAILED
    assert audit.error is not None and audit.error.code == "jobs_unavailable"
    bench.jobs.is_down = False
    assert bench.audit("--resume", "r").status == 0


def test_a_taken_id_is_refused(bench: Bench) -> None:
    assert bench.start("--run-id", "r").status == 0
    assert bench.start("--run-id", "r").err.startswith("audit_exists: ")


# -- what goes wrong on the way


async def dies(driver: Driver) -> None:
    await driver.begin()
    await painted(driver, guidances=1)
    raise SystemError("killed")


def test_a_job_that_died_is_noticed_and_the_run_resumed(bench: Bench) -> None:
    bench.does(dies)
    ended = bench.start("--run-id", "r")
    assert ended.status == 1
    assert "job_died: its job has failed" in ended.out
    assert f"fluxfill audit --resume r -c {bench.config}" in ended.err
    assert bench.get("r").result_count == 2
    bench.does(done_job(bench.settings.blobs))
    assert bench.audit("--resume", "r").status == 0
    assert (bench.get("r").attempt, set(bench.jobs.tasks)) == (2, {"fluxfill-audit-r", "fluxfill-audit-r.2"})


async def ends_incomplete(driver: Driver) -> None:
    await driver.begin()
    fault = AuditFault(code="out_of_memory", message="the device was full")
    failed = {name: CellProgress(status="failed", error=fault) for name in list(driver.audit.cells)[:1]}
    await driver.note(cells=failed)
    await driver.finish(AuditStatus.INCOMPLETE)


def test_an_incomplete_run_says_what_failed_and_is_no_success(bench: Bench) -> None:
    bench.does(ends_incomplete)
    ended = bench.start()
    assert ended.status == 1
    assert re.search(r"tiny-Q4_0_gs2 .*out_of_memory: the device was full", ended.out)


async def ends_in_brackets(driver: Driver) -> None:
    await driver.begin()
    fault = AuditFault(code="compile_failed", message="[/usr/bin/ld] cannot find -lcuda [bold]")
    verdict = CompileVerdict(variant="tiny-Q4_0", viable=False, verdict="[/usr/bin/ld] failed")
    cells = {name: CellProgress(status="failed", error=fault) for name in driver.audit.cells}
    await driver.note(cells=cells, compile=(verdict,))
    await driver.finish(AuditStatus.FAILED, fault)


def test_brackets_in_an_error_are_no_markup(bench: Bench) -> None:
    bench.does(ends_in_brackets)
    ended = bench.start("--run-id", "r")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert ended.out.count("compile_failed: [/usr/bin/ld] cannot find -lcuda [bold]") == 5
    assert "[/usr/bin/ld] failed" in ended.out
    assert "[/usr/bin/ld]" in bench.fluxfill("audit", "list", "-c", "[/usr/bin/ld]").err


async def interrupts(driver: Driver) -> None:
    await driver.begin()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(60)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python answers SIGINT, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_who_stops_looking_is_told_that_the_run_goes_on(bench: Bench) -> None:
    bench.does(interrupts)
    ended = bench.start("--run-id", "r")
    assert ended.status == 130
    assert f"r goes on. Follow it: fluxfill audit show --follow r -c {bench.config}" in ended.out
    assert f"Stop it: fluxfill audit cancel r -c {bench.config}" in ended.out
    assert bench.get("r").status == AuditStatus.RUNNING


# -- stored runs


def request_of(bench: Bench) -> AuditRequest:
    return AuditRequest(user_id="u", session_id="s", matrix=bench.settings.audit.matrix)


def stored(bench: Bench, run_id: str, **figures: float) -> None:
    """A finished run."""

    async def put() -> None:
        audit = await bench.store.create(request_of(bench), run_id)
        await done_job(bench.settings.blobs, **figures)(bench.driver(audit))

    asyncio.run(put())


def test_runs_are_listed(bench: Bench) -> None:
    stored(bench, "one")
    stored(bench, "two")
    ended = bench.sub("list")
    assert re.findall(r"\b(one|two)\b", ended.out) == ["two", "one"]
    assert "u/s" in ended.out and "4/4" in ended.out
    assert "one" not in bench.sub("list", "--limit", 1).out


def test_a_run_is_shown_with_its_figures(bench: Bench) -> None:
    stored(bench, "one", wall_s=1.25)
    ended = bench.sub("show", "one")
    assert ended.status == 0
    told = ("4 of 4 succeeded", "u/s", "proceed", "tiny-Q4_0, guidance 4, 8 steps", "1.25", "30.0", "0.900")
    assert [one for one in told if one not in ended.out] == []
    assert bench.sub("show", "--follow", "one").status == 0


def test_a_run_is_canceled(bench: Bench) -> None:
    asyncio.run(bench.store.create(request_of(bench), "waits"))
    assert bench.sub("cancel", "waits").out == "waits is canceled\n"
    assert bench.get("waits").status == AuditStatus.CANCELED
    again = bench.sub("cancel", "waits")
    assert (again.status, again.out) == (1, "")
    assert again.err.startswith("illegal_transition: ")


async def test_a_running_run_has_time_to_stop_by_itself(bench: Bench) -> None:
    reported = asyncio.Event()

    async def stops_when_asked(driver: Driver) -> None:
        await driver.begin()
        while not await driver.is_canceled():
            await asyncio.sleep(0.01)
        reported.set()

    bench.does(stops_when_asked)
    client = audit_client.AuditClient(bench.settings, bench.jobs)
    audit = await client.runs.start(request_of(bench), "runs")
    await until(lambda: bench.jobs.tasks)
    while (await bench.store.get("runs")).status != AuditStatus.RUNNING:
        await asyncio.sleep(0.01)
    ended = await client.cancel(audit.id)
    assert ended.status == AuditStatus.CANCELED
    assert reported.is_set(), "its job has ended when the command does"
    await client.runs.close()


def test_a_run_whose_job_cannot_be_reached_is_canceled_all_the_same(bench: Bench) -> None:
    audit = asyncio.run(bench.store.create(request_of(bench), "runs"))
    asyncio.run(bench.driver(audit).begin())
    bench.jobs.is_down = True
    ended = bench.sub("cancel", "runs")
    assert (ended.status, ended.out) == (0, "runs is canceled\n")
    assert bench.get("runs").status == AuditStatus.CANCELED


def test_audits_are_not_among_the_jobs(bench: Bench) -> None:
    stored(bench, "one")
    assert "one" not in bench.fluxfill("jobs", "-c", bench.config).out
    for command in ("show", "cancel"):
        ended = bench.fluxfill("jobs", command, "one", "-c", bench.config)
        assert (ended.status, ended.err) == (1, "unknown_job: there is no job one\n")


async def test_so_many_jobs_are_listed_however_many_audits_are_newer(bench: Bench) -> None:
    jobs, client = adapters.job_store(bench.settings.jobs), Client(bench.settings)
    for number in range(3):
        edit = make_job(f"edit-{number}", session_id=f"s{number}")
        await jobs.update(edit.id, edit.lock_key, lambda _, _rivals, now, edit=edit: (edit.evolve(created_at=now),))
    for number in range(3):
        await bench.store.create(request_of(bench), f"run-{number}", several=True)
    assert [job.id for job in await client.list(limit=2, status=None)] == ["edit-2", "edit-1"]
    assert [job.id for job in await client.list(limit=20, status=None)] == ["edit-2", "edit-1", "edit-0"]


def test_the_job_is_told_which_app_the_config_names(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("name: fluxfill", "name: other", 1))
    launcher = audits._launcher("http://127.0.0.1:1", config)
    assert isinstance(launcher, RayJobs)
    assert launcher._app == "other"


def test_the_report_is_fetched(bench: Bench, tmp_path: Path) -> None:
    stored(bench, "one")
    to = tmp_path / "report"
    ended = bench.sub("fetch", "one", to)
    pictures = {f"tiny-{quant}_gs{scale}.png" for quant in ("Q4_0", "Q8_0") for scale in (2, 4)}
    assert {path.name for path in to.iterdir()} == {PAGE, REPORT, RESULTS, TABLE, *pictures}
    assert ended.out.count("wrote ") == 8
    blobs = adapters.blob_store(bench.settings.blobs)
    data, _ = asyncio.run(blobs.get(image_path("one", "tiny-Q4_0_gs2"), max_bytes=10**6))
    assert (to / "tiny-Q4_0_gs2.png").read_bytes() == data
    assert json.loads((to / RESULTS).read_text())["run_id"] == "one"


@pytest.mark.parametrize("command", ["show", "cancel", "fetch"])
def test_an_unknown_run_is_said_to_be_unknown(bench: Bench, command: str, tmp_path: Path) -> None:
    more = (tmp_path / "x",) if command == "fetch" else ()
    ended = bench.sub(command, "none", *more)
    assert (ended.status, ended.out, ended.err) == (1, "", "unknown_audit: there is no run none\n")
    assert bench.sub(command, "../none", *more).status == 2


@pytest.mark.parametrize("command", ["list", "show"])
@pytest.mark.parametrize("option", ["-c", "--config", "--address", "--user", "--compile"])
def test_options_before_a_subcommand_are_not_dropped(fluxfill: Command, command: str, option: str) -> None:
    ended = fluxfill("audit", option, "prod.yaml", command, *(["r"] if command == "show" else []))
    assert (ended.status, ended.out) == (2, "")
    long = "--config" if option == "-c" else option
    assert f"{long} must come after `{command}`" in ended.err


def test_what_the_environment_says_is_no_option_before_a_subcommand(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert bench.sub("list").status == 0


async def test_results_of_what_has_none(bench: Bench) -> None:
    client = audit_client.AuditClient(bench.settings)
    for run in ("none", "a/b"):
        with pytest.raises(UnknownAudit):
            await client.results(run)
    with pytest.raises(UnknownAudit):
        audit_client.read_results(b"[", "here")


# -- what runs are good for


def test_a_slower_run_passes_no_gate(bench: Bench, tmp_path: Path) -> None:
    stored(bench, "old", wall_s=1.0)
    stored(bench, "slow", wall_s=1.5)
    same = bench.sub("compare", "old", "old")
    assert (same.status, same.err) == (0, "")
    ended = bench.sub("compare", "old", "slow")
    assert ended.status == 1
    assert re.search(r"tiny-Q4_0_gs2 .*wall_s .*\+50\.0%.*slower", ended.out)
    assert "tiny-Q4_0_gs2: wall_s went from 1 to 1.5 (+50.0%)." in ended.err
    assert bench.sub("compare", "old", "slow", "--max-slower-percent", 60).status == 0
    bench.sub("fetch", "slow", tmp_path / "fetched")
    file = tmp_path / "fetched" / RESULTS
    assert bench.fluxfill("audit", "compare", file, file, "-c", "nowhere.yaml").status == 0
    assert bench.sub("compare", file, "old").status == 0


def test_a_worse_picture_passes_no_gate(bench: Bench) -> None:
    stored(bench, "old", ssim=0.95)
    stored(bench, "worse", ssim=0.9)
    assert "ssim went from 0.95 to 0.9" in bench.sub("compare", "old", "worse").err
    assert bench.sub("compare", "old", "worse", "--max-ssim-drop", 0.1).status == 0
    assert "0.0%" in bench.sub("compare", "old", "worse", "--max-ssim-drop", 0.1, "--all").out


def test_what_is_recommended_is_written_into_a_config(bench: Bench, tmp_path: Path) -> None:
    stored(bench, "one")
    ended = bench.fluxfill("audit", "apply", "one", bench.config)
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"^- +variant: telea$", ended.out, re.M) and re.search(
        r"^\+ +variant: tiny-Q4_0$", ended.out, re.M
    )
    assert f"serve deploy {bench.config}" in ended.out
    inference = load(bench.config).inference
    assert (inference.variant, inference.guidance_scale, inference.steps) == ("tiny-Q4_0", 4.0, 8)
    assert "nothing was changed" in bench.fluxfill("audit", "apply", "one", bench.config).out


@contextmanager
def answering(port: int, body: bytes) -> Iterator[None]:
    """Who answers every GET there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_an_app_that_is_not_as_the_file_says_is_told_apart(bench: Bench) -> None:
    stored(bench, "one")
    port = load(bench.config).port
    states = {"gone": VariantReadiness(state="ready")}
    other = Readiness(ready=True, default_variant="gone", defaults={"variant": "gone"}, variants=states)
    with answering(port, other.model_dump_json().encode()):
        ended = bench.fluxfill("audit", "apply", "one", bench.config)
    assert ended.status == 0
    assert "variant is telea in the file, and gone in the app" in ended.err
    with answering(port, b"<!doctype html>"):
        assert bench.fluxfill("audit", "apply", "one", bench.config).status == 0


@pytest.mark.parametrize("command", ["compare", "apply"])
def test_a_run_without_results_says_so(bench: Bench, command: str, tmp_path: Path) -> None:
    asyncio.run(bench.store.create(request_of(bench), "waits"))
    other = bench.config if command == "apply" else "waits"
    more = () if command == "apply" else ("-c", bench.config)
    ended = bench.fluxfill("audit", command, "waits", other, *more)
    assert (ended.status, ended.err) == (1, "unknown_audit: waits is queued and has no results\n")
    (tmp_path / "no.json").write_text("[]")
    assert "is no results.json" in bench.fluxfill("audit", command, tmp_path / "no.json", other, *more).err


@pytest.mark.parametrize("command", ["compare", "apply"])
@pytest.mark.parametrize("status", [None, AuditStatus.RUNNING, AuditStatus.FAILED, AuditStatus.CANCELED])
def test_what_an_earlier_attempt_found_is_stale(bench: Bench, command: str, status: AuditStatus | None) -> None:
    stored(bench, "one")

    async def resume() -> None:
        driver = bench.driver(await bench.store.resume("one"))
        if status is not None:
            await driver.begin()
        if status is not None and status.is_over:
            await driver.finish(status)

    text = bench.config.read_text()
    asyncio.run(resume())
    more = (bench.config,) if command == "apply" else ("one", "-c", bench.config)
    ended = bench.fluxfill("audit", command, "one", *more)
    told = f"audit_refused: one is {status or 'queued'}: the results it has are not final\n"
    assert (ended.status, ended.out, ended.err) == (1, "", told)
    assert bench.config.read_text() == text


# -- the demo


def test_the_sample_is_one_window_of_the_smallest_size(tmp_path: Path) -> None:
    assert window_sizes(sample(tmp_path), load(SOUND).settings) == [(256, 256)] == [(PART[2] - PART[0],) * 2]


def test_a_laptops_default_audit_is_one_that_its_config_can_run() -> None:
    settings = load(SOUND).settings
    assert set(settings.audit.matrix.variants) <= set(settings.variants)
    assert all(settings.variant(name).num_gpus == 0 for name in settings.audit.matrix.variants)

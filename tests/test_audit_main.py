"""The audit job's arguments and the stored run it works on, without Ray."""

import asyncio
import uuid
from collections.abc import Callable

import pytest

from benchmarks.audit.arguments import APP, ATTEMPT, RUN, parse
from benchmarks.audit.queued import queued
from serve_app.adapters.memory import MemoryBlobStore, MemoryJobStore
from serve_app.audit.options import OPTIONS
from serve_app.audit.record import AuditStatus
from serve_app.audit.store import LAUNCH_S, AuditStore
from serve_app.errors import AuditExists, AuditRunning, InputError, UnknownAudit, UnknownVariant
from serve_app.jobs.claims import claim_of
from serve_app.parameters import AuditRequest
from serve_app.settings import AuditSettings, Settings

from .rig import Clock

WHOSE = ("--user", "u", "--session", "s")
SETTINGS = Settings(
    variants={"telea": {}, "sleeper": {"definition": {"family": "pause"}}},
    audit={
        "matrix": {"variants": ("telea", "sleeper"), "guidance_scales": (3,)},
        "link_hours": 5,
        "gpus": 4,
        "budget": {"min_ssim": 0.5},
    },
)


def asked(*argv: str, defaults: AuditSettings = SETTINGS.audit) -> AuditRequest:
    return parse([*WHOSE, *argv], {}).asked.request(defaults)


# -- arguments


def test_what_is_not_said_is_as_the_settings_say() -> None:
    audit = SETTINGS.audit
    assert asked() == AuditRequest(
        user_id="u",
        session_id="s",
        matrix=audit.matrix,
        link_hours=5,
        gpus=4,
        budget=audit.budget,
    )


def test_every_axis_and_option_can_be_said() -> None:
    said = asked(
        *("--variants", "Q4_0, Q8_0", "--guidance", "2,4.5", "--steps", "20,28", "--seeds", "0,7"),
        *("--prompt", "grass, dry", "--prompt", "", "--crop", "auto,original", "--reference", "Q4_0", "--runs", "3"),
        *("--mask-grow", "0,0.02"),
        *("--compile", "Q4_0", "--link-hours", "1.5", "--price-per-hour", "0.7", "--gpus", "0"),
    )
    matrix = said.matrix
    assert (matrix.variants, matrix.guidance_scales) == (("Q4_0", "Q8_0"), (2.0, 4.5))
    assert (matrix.steps, matrix.seeds, matrix.crops) == ((20, 28), (0, 7), ("auto", "original"))
    assert (matrix.prompts, matrix.mask_grows) == (("grass, dry", ""), (0, 0.02))
    assert (said.reference, said.runs, said.compile_variants) == ("Q4_0", 3, ("Q4_0",))
    assert (said.link_hours, said.price_per_hour, said.gpus) == (1.5, 0.7, 0)


def test_every_field_of_a_request_can_be_said_or_is_a_setting() -> None:
    """A field that is added to the contract is not forgotten here."""
    options = {option.field for option in OPTIONS}
    assert set(AuditRequest.model_fields) - {"type", "matrix", "user_id", "session_id"} <= options | set(
        AuditSettings.model_fields
    )
    assert set(type(SETTINGS.audit.matrix).model_fields) <= options


def test_no_variant_is_compiled_where_none_is_said() -> None:
    assert (asked("--compile", "none").compile_variants, asked().compile_variants) == ((), None)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--guidance", "101"), "guidance_scales"),
        (("--guidance", "2,2"), "guidance_scales: a value is given twice"),
        (("--runs", "1"), "runs"),
        (("--mask-grow", "0.06"), "mask_grows"),
        (("--link-hours", "200"), "link_hours"),
        (("--reference", "Q8_0"), "Q8_0 is not among"),
        (("--variants", "a/b"), "variants"),
        (("--variants", ""), "variants"),
    ],
)
def test_a_wrong_value_is_named(argv: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError, match=named):
        asked(*argv)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((), "name --user and --session, or --resume RUN"),
        (("--user", "u"), "name --user and --session"),
        (("--resume", "r", "--guidance", "2"), "--resume goes on with a run as it was asked for"),
        ((*WHOSE, "--run-id", "../r"), "'../r' is not 1 to 64 letters"),
        (("--resume", "r\n"), "is not 1 to 64 letters"),
        ((*WHOSE, "--guidance", "much"), "argument --guidance: "),
        ((*WHOSE, "--crop", "square"), "argument --crop: "),
        ((*WHOSE, "--speed", "1"), "--speed"),
    ],
)
def test_a_command_line_that_cannot_be_meant_says_so(
    argv: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(list(argv), {})
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_launched_job_takes_its_run_from_the_environment() -> None:
    given = parse([], {RUN: "-r", ATTEMPT: "3", APP: "fluxfill"})
    assert (given.launched, given.app) == (("-r", 3), "fluxfill")


def test_a_command_line_counts_for_more_than_the_environment() -> None:
    assert parse([*WHOSE], {RUN: "r", ATTEMPT: "1"}).launched is None


# -- the run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> AuditStore:
    url = f"memory:{uuid.uuid4().hex}"
    return AuditStore(MemoryJobStore(url, clock), MemoryBlobStore(url))


async def of(store: AuditStore, *argv: str, say: Callable[[str], None] = print) -> str:
    audit = await queued(parse(list(argv), {}).asked, store, SETTINGS, say)
    return f"{audit.id} {audit.attempt} {audit.status}"


async def test_a_new_run_is_stored(store: AuditStore) -> None:
    assert await of(store, *WHOSE, "--run-id", "mine", "--guidance", "2,4") == "mine 1 queued"
    assert set((await store.get("mine")).cells) == {"telea_gs2", "telea_gs4", "sleeper_gs2", "sleeper_gs4"}
    with pytest.raises(AuditExists):
        await of(store, *WHOSE, "--run-id", "mine")


async def test_a_variant_that_is_not_served_stores_nothing(store: AuditStore) -> None:
    with pytest.raises(UnknownVariant, match="'Q8_0' is not served; there are telea, sleeper"):
        await of(store, *WHOSE, "--variants", "telea,Q8_0")
    assert await store.list() == []


async def test_a_run_that_does_not_exist_cannot_be_resumed(store: AuditStore) -> None:
    with pytest.raises(UnknownAudit):
        await of(store, "--resume", "nobody")


async def test_a_run_that_is_over_is_resumed_at_once(store: AuditStore) -> None:
    said = list[str]()
    await of(store, *WHOSE, "--run-id", "r")
    claim = claim_of(await store.begin("r", 1, lease_s=60))
    await store.finish(claim, AuditStatus.INCOMPLETE)
    assert await of(store, "--resume", "r", say=said.append) == "r 2 queued"
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
async def test_the_resume_of_a_dead_job_waits_until_it_counts_as_dead(
    store: AuditStore, clock: Clock, begun: bool
) -> None:
    await of(store, *WHOSE, "--run-id", "r")
    if begun:
        await store.begin("r", 1, lease_s=60)
    # Its driver was killed when it had half a second to its next sign of life, which the command waits for.
    clock.advance((60 if begun else LAUNCH_S) - 0.5)
    said = list[str]()

    def say(line: str) -> None:
        said.append(line)
        clock.advance(0.5)

    assert await of(store, "--resume", "r", say=say) == "r 2 queued"
    assert [line.split(":")[0] for line in said] == [f"r is {'running' if begun else 'queued'}"]


async def test_a_job_that_lives_is_not_taken_over(store: AuditStore, clock: Clock) -> None:
    await of(store, *WHOSE, "--run-id", "r")
    clock.advance(LAUNCH_S - 0.2)
    said = asyncio.Queue[str]()
    waiting = asyncio.create_task(of(store, "--resume", "r", say=said.put_nowait))
    assert "waiting" in await said.get()
    await store.begin("r", 1, lease_s=60)
    with pytest.raises(AuditRunning, match="r is running"):
        await waiting

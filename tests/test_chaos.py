"""The parts of the chaos benchmark that judge, so that its verdict can be trusted. The run itself is no test."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from benchmarks import servers
from benchmarks.chaos import app, records
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.publishing import LATER_S, schedule
from benchmarks.chaos.sessions import (
    MOST_SESSIONS,
    POISONS,
    Poison,
    Session,
    color_of,
    grey_photo,
    has_color,
    jpeg,
    mask,
    photo,
    plan,
)
from benchmarks.chaos.verdict import Evidence, Outcome, conflicting, is_over, outcome
from serve_app.jobs.ports import Delivery
from serve_app.jobs.record import Job, JobError, State

from .backends import make_job
from .rig import SESSION, USER, Rig

ERROR = JobError(code="missing_input", message="")


# -- what is published


def test_every_photo_has_a_color_of_its_own() -> None:
    colors = [color_of(number) for number in range(MOST_SESSIONS)]
    assert len(set(colors)) == MOST_SESSIONS
    assert all(0 <= level <= 255 for color in colors for level in color)


@pytest.mark.parametrize("number", [0, 7, 123, 950, 999])
async def test_the_right_result_is_told_from_every_other(number: int) -> None:
    rig, color = Rig(), color_of(number)
    await rig.put("original.jpg", jpeg(photo(color)))
    await rig.put("mask_auto.png", mask())
    assert (await rig.work()).reason == "succeeded"
    edited = await rig.blob("edited.jpg")
    assert has_color(edited, color)
    assert not has_color(jpeg(photo(color)), color), "the leash was not painted over"
    for digit in (1, 10, 100):
        neighbor = number - digit if number // digit % 10 else number + digit
        assert not has_color(edited, color_of(neighbor)), "another's"


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.name)
async def test_a_poisoned_session_ends_as_its_row_says(poison: Poison) -> None:
    rig = Rig()
    for name, data in (("original.jpg", poison.original()), ("mask_auto.png", poison.mask())):
        if data is not None:
            await rig.put(name, data)
    data = poison.data(SESSION).replace(b'"chaos"', f'"{USER}"'.encode())
    verdict = await rig.worker.work(Delivery(data=data, attributes={}, message_id="m"))
    assert (verdict.action, verdict.reason) == ("ack", poison.reason)
    assert [letter["deadLetterReason"] for _, letter in rig.topics.dead] == [poison.reason]


def test_a_plan_has_every_poison_and_no_two_messages_alike() -> None:
    sessions = plan(40, 20)
    assert len({session.data for session in sessions}) == len(sessions) == 40
    assert {session.poison for session in sessions} == {None, *POISONS}


def test_a_schedule_sends_each_once_and_some_twice() -> None:
    sessions = plan(100, 10)
    sendings = schedule(sessions, 20, over_s=50)
    times = {session.id: [at for at, other in sendings if other is session] for session in sessions}
    twice = [at for at in times.values() if len(at) == 2]
    assert (len(sendings), len(twice)) == (120, 20)
    pauses = sorted(second - first for first, second in twice)
    assert pauses[:10] == [0.0] * 10
    assert all(LATER_S[0] <= pause <= LATER_S[1] for pause in pauses[10:])
    assert [at for at, _ in sendings] == sorted(at for at, _ in sendings)


# -- what is concluded

GOOD = Session(id="s", data=b"", original=grey_photo, mask=mask, color=(1, 2, 3))
POISONED = Session(id="s", data=b"", original=grey_photo, mask=mask, poison=POISONS[3])
DONE, FAILED = make_job(status=State.SUCCEEDED), make_job(status=State.FAILED, error=ERROR)
RUNNING = make_job(status=State.RUNNING)
LETTER = {"deadLetterReason": "missing_input"}


def found(*jobs: Job, letters: tuple[Mapping[str, str], ...] = (), document: str = "completed") -> Evidence:
    return Evidence(jobs=jobs, letters=letters, document=document)


@pytest.mark.parametrize(
    ("session", "evidence", "has_right_picture", "expected", "over"),
    [
        (GOOD, found(DONE), True, Outcome.COMPLETED, True),
        (GOOD, found(DONE), False, Outcome.WRONG, True),
        (GOOD, found(DONE, DONE), True, Outcome.WRONG, True),
        (GOOD, found(DONE, document="processing"), True, Outcome.LOST, False),
        (GOOD, found(FAILED, document="failed"), True, Outcome.LOST, True),
        (GOOD, found(RUNNING, document="processing"), True, Outcome.STILL_RUNNING, False),
        (GOOD, found(DONE, RUNNING), True, Outcome.STILL_RUNNING, False),
        (GOOD, found(document=""), False, Outcome.LOST, False),
        (POISONED, found(FAILED, letters=(LETTER,)), False, Outcome.DEAD_LETTERED, True),
        (POISONED, found(FAILED, letters=(LETTER, LETTER)), False, Outcome.DEAD_LETTERED, True),
        (POISONED, found(letters=(LETTER,)), False, Outcome.DEAD_LETTERED, True),
        (POISONED, found(FAILED), False, Outcome.LOST, False),
        (POISONED, found(DONE, letters=(LETTER,)), False, Outcome.WRONG, True),
        (POISONED, found(FAILED, letters=({"deadLetterReason": "other"},)), False, Outcome.WRONG, True),
        (POISONED, found(RUNNING, letters=(LETTER,)), False, Outcome.STILL_RUNNING, False),
    ],
)
def test_outcomes(session: Session, evidence: Evidence, has_right_picture: bool, expected: Outcome, over: bool) -> None:
    ended, why = outcome(session, evidence, has_right_picture=has_right_picture)
    assert (ended, is_over(session, evidence)) == (expected, over)
    assert bool(why) == (expected not in (Outcome.COMPLETED, Outcome.DEAD_LETTERED))


@pytest.mark.emulator
def test_every_version_of_a_result_that_was_ever_stored_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with servers.s3(tmp_path) as port:
        records.make_bucket(port)
        for path, body in (("a", b"1"), ("a", b"1"), ("b", b"1"), ("b", b"2"), ("b", b"1")):
            records.bucket(port).put_object(Bucket=app.BUCKET, Key=f"{path}/edited.jpg", Body=body)
        results = records.stored_results(port)
    assert {path: len(hashes) for path, hashes in results.items()} == {"a/edited.jpg": 2, "b/edited.jpg": 3}
    assert conflicting(results) == ["b/edited.jpg"]


# -- the proxy


@asynccontextmanager
async def proxied_echo() -> AsyncIterator[Proxy]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Proxy(server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


async def test_the_proxy_passes_both_ways_and_passes_the_end_on() -> None:
    async with proxied_echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"there\n")
        assert await reader.readline() == b"there\n"
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()


async def test_a_cut_proxy_refuses_and_drops_and_comes_back() -> None:
    async with proxied_echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"there\n")
        await reader.readline()
        proxy.cut()
        with suppress(ConnectionError):
            # Ends, one way or the other.
            assert await reader.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        await proxy.mend()
        _, again = await asyncio.open_connection("127.0.0.1", proxy.port)
        again.close()
        writer.close()

"""Dead letters: what every backend of the port guarantees, and the commands that list and replay them."""

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml
from google.pubsub_v1 import types

from deployments.cli import dead_letters, main
from deployments.cli.dead_letters import Replay, Replayed, each, first
from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.pubsub import client
from serve_app.adapters.pubsub.broker import Bounds
from serve_app.adapters.pubsub.broker import Broker as Queues
from serve_app.adapters.pubsub.calls import Calls
from serve_app.errors import BrokerUnavailable, StoreUnavailable
from serve_app.jobs.claims import Change
from serve_app.jobs.ports import DeadLetter, DeadLetters
from serve_app.jobs.record import Job, JobError, State
from serve_app.settings import MessagesSettings

from .backends import Broker, Recorder, at, embedded_broker, make_job, until

MAX_BYTES = 64_000
SESSION = json.dumps({"userId": "u", "sessionId": "s"}).encode()


def bodies(letters: Sequence[DeadLetter]) -> list[bytes]:
    return sorted(letter.delivery.data for letter in letters)


async def bury(broker: Broker, *data: bytes, **attributes: str) -> None:
    publisher = broker.publisher
    for body in data:
        await publisher.publish("dead", body, attributes)


async def pull_all(letters: DeadLetters) -> list[DeadLetter]:
    return [letter async for letter in each(letters)]


# The port


async def test_letters_are_pulled_given_back_and_acknowledged(broker: Broker) -> None:
    letters = adapters.dead_letters(broker.settings)
    assert await letters.pull(10) == []
    await bury(broker, b"1", b"2", b"3", reason="r")
    pulled = await pull_all(letters)
    assert bodies(pulled) == [b"1", b"2", b"3"]
    assert pulled[0].delivery.attributes == {"reason": "r"} and pulled[0].delivery.publish_time
    assert await letters.pull(10) == [], "they are in hand"
    await letters.acknowledge(pulled[:1])
    await letters.give_back(pulled[1:])
    assert bodies(await pull_all(letters)) == bodies(pulled[1:])
    await letters.close()


async def test_no_more_than_the_limit_are_pulled(broker: Broker) -> None:
    letters = adapters.dead_letters(broker.settings)
    await bury(broker, b"1", b"2", b"3")
    assert len(await letters.pull(2)) <= 2
    await letters.close()


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["embedded", "memory"], indirect=True)
async def test_a_letter_in_hand_comes_again_when_its_time_is_over(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IN_HAND_S", 1)
    letters = adapters.dead_letters(broker.settings)
    await bury(broker, b"x")
    [letter] = await letters.pull(1)
    pulled: list[DeadLetter] = []
    while not pulled:
        pulled += await letters.pull(1)
    assert pulled[0].delivery.message_id == letter.delivery.message_id
    await letters.close()


@pytest.mark.slow
async def test_googles_pubsub_may_take_its_time_to_say_that_there_are_none(
    embedded: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE_S", 0.5)
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", embedded.settings.url.removeprefix("embedded://"))
    letters = adapters.dead_letters(embedded.settings.model_copy(update={"url": "pubsub:"}))
    assert await letters.pull(1) == []
    await bury(embedded, b"x")
    monkeypatch.setattr(client, "PATIENCE_S", 5.0)
    assert bodies(await letters.pull(1)) == [b"x"]
    await letters.close()


async def test_a_broker_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.4)
    letters = adapters.dead_letters(MessagesSettings(url=f"embedded://127.0.0.1:{free_port()}"))
    with pytest.raises(BrokerUnavailable, match="no connection"):
        await letters.pull(1)
    await letters.close()


async def test_a_subscription_that_is_missing_is_said_to_be(embedded: Broker) -> None:
    letters = adapters.dead_letters(embedded.settings.model_copy(update={"dead_letter_subscription": "nowhere"}))
    with pytest.raises(BrokerUnavailable, match="subscriptions/nowhere"):
        await letters.pull(1)
    await letters.close()


class Silent(Calls):
    """Answers no pull, but those that ask for an answer at once, where it does."""

    answers_at_once = False

    async def pull(self, request: types.PullRequest, _context: Any) -> types.PullResponse:
        if not (self.answers_at_once and request.return_immediately):
            await asyncio.Event().wait()
        return types.PullResponse()


@pytest.fixture
async def silent(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Silent, str]]:
    """A broker that hangs, and its address; Google's, too, for who asks for that."""
    monkeypatch.setattr(client, "PATIENCE_S", 0.3)
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.3)
    calls, server = Silent(Queues(Bounds(), time.monotonic, time.time)), grpc.aio.server()
    server.add_generic_rpc_handlers(calls.handlers())
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
    yield calls, address
    await server.stop(grace=None)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["pubsub://{}", "embedded://{}", "pubsub:"])
async def test_a_broker_that_hangs_is_not_one_without_letters(silent: tuple[Silent, str], url: str) -> None:
    letters = adapters.dead_letters(MessagesSettings(url=url.format(silent[1])))
    with pytest.raises(BrokerUnavailable, match=r"Pub/Sub's pull on .* failed"):
        await letters.pull(1)
    await letters.close()


@pytest.mark.slow
async def test_where_google_answers_and_finds_no_letters_there_are_none(silent: tuple[Silent, str]) -> None:
    silent[0].answers_at_once = True
    letters = adapters.dead_letters(MessagesSettings(url="pubsub:"))
    assert await letters.pull(1) == []
    await letters.close()


# Looking


async def test_many_letters_are_each_found_once_and_stay(embedded: Broker) -> None:
    letters = adapters.dead_letters(embedded.settings)
    await bury(embedded, *(b"%03d" % i for i in range(250)))
    assert len(await first(letters, 120)) == 120
    found = await first(letters, 10_000)
    assert bodies(found) == [b"%03d" % i for i in range(250)]
    assert len(await pull_all(letters)) == 250
    await letters.close()


async def test_a_letter_that_comes_again_in_one_run_counts_once(
    memory: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IN_HAND_S", 0)
    monkeypatch.setattr(dead_letters, "BATCH", 1)
    await bury(memory, b"1", b"2")
    assert bodies(await pull_all(adapters.dead_letters(memory.settings))) == [b"1", b"2"]


# Replaying


class Bench:
    """A broker and a job store, with letters of jobs that failed."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.jobs = adapters.job_store(f"memory:{uuid.uuid4().hex}")
        self.letters = adapters.dead_letters(broker.settings)

    async def fail(self, job_id: str, code: str, **attributes: str) -> None:
        """A job that failed, and its letter."""
        await bury(self.broker, SESSION, deadLetterReason=code, deadLetterJobId=job_id, **attributes)
        job = make_job(
            job_id,
            status=State.FAILED,
            attempt=5,
            dead_lettered=True,
            error=JobError(code=code, message="m"),
            finished_at=at(9),
        )
        await self.store(job)

    async def store(self, job: Job) -> None:
        await self.jobs.update(job.id, job.lock_key, lambda _job, _rivals, _now: (job,))

    async def replay(self, **wanted: str) -> Replayed:
        replay = Replay(self.letters, self.jobs, self.broker.publisher, max_bytes=MAX_BYTES)
        return await replay.run(lambda letter: wanted.items() <= letter.delivery.attributes.items())

    async def left(self) -> list[str]:
        """Job ids of the letters that are still there."""
        letters = await first(self.letters, 100)
        return sorted(letter.delivery.attributes.get("deadLetterJobId", "") for letter in letters)

    async def published(self, count: int) -> Recorder:
        handle = Recorder()
        async with self.broker.source(handle):
            await until(lambda: len(handle.deliveries) >= count)
        return handle


@pytest.fixture(params=["embedded", "memory"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.getfixturevalue(request.param))


async def test_the_chosen_letters_are_sent_again_and_the_others_stay(bench: Bench) -> None:
    await bench.fail("edit-1", "invalid_image", priority="high", deadLetterAttempts="1")
    await bench.fail("edit-2", "out_of_memory")
    done = await bench.replay(deadLetterReason="invalid_image")
    assert (done.sent, done.left, done.refused, done.error) == (1, 1, [], None)
    [delivery] = (await bench.published(1)).deliveries
    assert (delivery.data, delivery.attributes) == (SESSION, {"priority": "high"})
    job = await bench.jobs.get("edit-1")
    assert job and (job.status, job.attempt, job.error, job.dead_lettered) == (State.QUEUED, 0, None, False)
    other = await bench.jobs.get("edit-2")
    assert other and other.status == State.FAILED
    assert await bench.left() == ["edit-2"]


async def test_a_letter_whose_job_was_asked_for_again_and_canceled_runs_nothing(bench: Bench) -> None:
    for id, status in (("edit-1", State.CANCELED), ("edit-2", State.QUEUED), ("edit-3", State.SUCCEEDED)):
        await bench.fail(id, "out_of_memory", id=id)
        await bench.store(make_job(id, status=status, attempt=1, finished_at=at(20)))
    done = await bench.replay()
    assert (done.sent, done.canceled, done.left) == (2, 1, 0)
    sent = (await bench.published(2)).deliveries
    assert {delivery.attributes["id"] for delivery in sent} == {"edit-2", "edit-3"}
    stored = {job.id: (job.status, job.attempt) for job in await bench.jobs.list()}
    expected = [(State.CANCELED, 1), (State.QUEUED, 1), (State.SUCCEEDED, 1)]
    assert [stored[id] for id in sorted(stored)] == expected, "replaying a job that did not fail changes nothing"
    assert await bench.left() == []


async def test_a_message_without_a_job_is_sent_again(bench: Bench) -> None:
    await bury(bench.broker, b"not json", deadLetterReason="malformed_message", deadLetterJobId="")
    await bury(bench.broker, SESSION, deadLetterReason="missing_input", deadLetterJobId="edit-gone")
    done = await bench.replay()
    assert (done.sent, done.left) == (2, 0)
    assert set((await bench.published(2)).bodies) == {b"not json", SESSION}
    assert await bench.left() == []


async def test_what_was_kept_in_part_is_refused_and_stays(bench: Bench) -> None:
    await bench.fail("edit-1", "invalid_image", deadLetterTruncated="true")
    await bench.fail("edit-2", "invalid_image")
    done = await bench.replay()
    assert (done.sent, done.left, len(done.refused)) == (1, 0, 1)
    assert "only its beginning was kept" in done.refused[0]
    assert await bench.left() == ["edit-1"]
    job = await bench.jobs.get("edit-1")
    assert job and job.status == State.FAILED


async def test_what_fails_again_at_once_is_not_sent_for_ever(bench: Bench) -> None:
    await bench.fail("edit-1", "invalid_image")
    publish = bench.broker.publisher.publish

    class Failing:
        """A topic whose messages become dead letters at once."""

        sent = 0

        async def publish(self, topic: Any, data: bytes, attributes: Any) -> str:
            self.sent += 1
            return await publish("dead", data, {**attributes, "deadLetterJobId": "edit-1"})

    topic = Failing()
    done = await Replay(bench.letters, bench.jobs, topic, max_bytes=MAX_BYTES).run(lambda _: True)
    assert (topic.sent, done.sent, done.left) == (1, 1, 1)


class Down:
    """A job store that is away."""

    def __init__(self, jobs: Any) -> None:
        self._jobs = jobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jobs, name)

    async def update(self, _job_id: str, _lock_key: str, _change: Change) -> Job:
        raise StoreUnavailable("the job store is away")


async def test_a_store_that_is_away_loses_no_letter(bench: Bench) -> None:
    await bench.fail("edit-1", "invalid_image")
    await bury(bench.broker, b"x", deadLetterJobId="")
    replay = Replay(bench.letters, Down(bench.jobs), bench.broker.publisher, max_bytes=MAX_BYTES)
    done = await replay.run(lambda letter: bool(letter.delivery.attributes["deadLetterJobId"]))
    assert isinstance(done.error, StoreUnavailable) and done.sent == 0
    assert "edit-1" in await bench.left()


class Away:
    """A topic that cannot be published to."""

    async def publish(self, _topic: Any, _data: bytes, _attributes: Any) -> str:
        raise BrokerUnavailable("the broker is away")


async def test_a_letter_is_acknowledged_only_after_its_message_was_published(bench: Bench) -> None:
    await bench.fail("edit-1", "invalid_image")
    done = await Replay(bench.letters, bench.jobs, Away(), max_bytes=MAX_BYTES).run(lambda _: True)
    assert isinstance(done.error, BrokerUnavailable) and done.sent == 0
    assert await bench.left() == ["edit-1"]
    done = await bench.replay()
    assert (done.sent, done.error) == (1, None)
    assert (await bench.published(1)).bodies == [SESSION]
    assert await bench.left() == []


# The commands

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def fluxfill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The console script, in this process: its exit status, and all it wrote."""
    monkeypatch.setattr(dead_letters.out, "width", 200)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fluxfill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        screen = capsys.readouterr()
        return int(ended.value.code or 0), screen.out + screen.err

    return run


@pytest.fixture
def app(tmp_path: Path) -> Iterator[tuple[Path, Broker]]:
    """A config and the broker that it names."""
    with embedded_broker() as broker:
        raw = yaml.safe_load(Path("serve_config.yaml").read_text())
        raw["applications"][0]["args"] |= {
            "blobs": f"files:{tmp_path}/blobs",
            "jobs": f"sqlite:{tmp_path}/jobs.db",
            "messages": {"url": broker.settings.url},
        }
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(raw, sort_keys=False))
        yield config, broker


async def _bury_two(broker: Broker) -> None:
    why = {"deadLetterError": "not a picture", "deadLetterAttempts": "1", "deadLetterReason": "invalid_image"}
    await bury(broker, SESSION, deadLetterJobId="edit-1", **why)
    await bury(broker, b"{}", deadLetterReason="malformed_message", deadLetterTruncated="true")


def test_the_commands(app: tuple[Path, Broker], fluxfill: Command) -> None:
    config, broker = app
    asyncio.run(_bury_two(broker))
    status, screen = fluxfill("deadletters", "list", "-c", config)
    assert status == 0
    assert all(told in screen for told in ("invalid_image", "edit-1", "u/s", "not a picture", "malformed_message"))

    status, screen = fluxfill("deadletters", "replay", "-c", config)
    assert status != 0 and "--all" in screen
    assert fluxfill("deadletters", "replay", "--job", "edit-1", "-c", config) == (
        0,
        "replayed 1, left 1, canceled since 0, could not replay 0\n",
    )
    status, screen = fluxfill("deadletters", "replay", "--all", "-c", config)
    assert status == 1 and "only its beginning" in screen
    assert "replayed 0, left 0, canceled since 0, could not replay 1\n" in screen
    status, screen = fluxfill("deadletters", "list", "-c", config)
    assert "malformed_message" in screen and "edit-1" not in screen


@pytest.mark.parametrize("message", ["broken PNG file (chunk b'[/a]')", "[bold]loud[/bold]", "[link=x]y"])
def test_no_word_of_a_letter_is_taken_for_markup(app: tuple[Path, Broker], fluxfill: Command, message: str) -> None:
    config, broker = app
    attributes = dict.fromkeys(("deadLetterError", "deadLetterReason", "deadLetterJobId"), message)
    asyncio.run(bury(broker, SESSION, **attributes))
    status, screen = fluxfill("deadletters", "list", "-c", config)
    assert (status, screen.count(message)) == (0, 3)


def test_no_word_of_a_letter_reaches_the_terminal_as_a_command(app: tuple[Path, Broker], fluxfill: Command) -> None:
    config, broker = app
    asyncio.run(bury(broker, SESSION, deadLetterError="a\x1b]52;c;aGk=\x07b\x9b2Jc\x1b[2J"))
    status, screen = fluxfill("deadletters", "list", "-c", config)
    assert status == 0 and "a]52;c;aGk=b2Jc[2J" in screen

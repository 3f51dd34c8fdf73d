"""What Firestore adds to what every job store and session mirror guarantees."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.stores import firestore_database
from serve_app.adapters.stores.firestore import CLAIM
from serve_app.adapters.stores.firestore_database import MAX_NAME_BYTES, Firestore, document_name
from serve_app.errors import QuotaExceeded, SettingsError, StoreUnavailable
from serve_app.jobs import claims
from serve_app.jobs.ports import JobStore
from serve_app.jobs.record import Job, State
from serve_app.models import Progress

from .backends import at, make_job
from .job_servers import HOST, Gate, Opened, forget_firebase_app, gate
from .test_job_stores import KEY, Slow, claimed, ended, put, running

INDEXES = Path(__file__).parents[1] / "k8s/firestore.indexes.json"


@pytest.mark.parametrize("url", ["firestore:", "firestore:My Project", "firestore://p", "firestore:p?databse=x"])
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="form firestore:PROJECT"):
        adapters.job_store(url)


NAMES = {
    "edit-0a_1": "edit-0a_1",
    "user/session": "user%2Fsession",
    ".": "%2E",
    "..": "%2E%2E",
    "__a__": "%5F%5Fa%5F%5F",
    "__": "__",
    "ü %": "%C3%BC%20%25",
}


@pytest.mark.parametrize(("key", "name"), NAMES.items())
def test_document_names_are_safe(key: str, name: str) -> None:
    assert document_name(key) == name


def test_document_names_are_short_enough_and_differ() -> None:
    assert document_name("a" * MAX_NAME_BYTES) == "a" * MAX_NAME_BYTES
    names = {document_name("/" * MAX_NAME_BYTES + end) for end in "ab"}
    assert len(names) == 2 and all(len(name) <= MAX_NAME_BYTES for name in names)


def test_every_filtered_and_ordered_query_has_its_index() -> None:
    """The emulator needs none, so that only this notices one that is missing."""
    indexes = json.loads(INDEXES.read_text())["indexes"]
    found = [{field["fieldPath"]: field["order"] for field in index["fields"]} for index in indexes]
    assert {index["collectionGroup"] for index in indexes} == {"jobs"}
    # One filtered by two fields more is merged from those of each.
    sessions, owners = (["sessionKey"], ["sessionKey", "status"]), (["owner"], ["owner", "status"])
    for filtered in (["status"], ["type"], *sessions, *owners, ["variant", "status"]):
        assert dict.fromkeys(filtered, "ASCENDING") | {"createdAt": "DESCENDING"} in found
    assert {"receiver": "ASCENDING", "owes.webhook": "ASCENDING"} in found


@pytest.mark.slow
async def test_a_server_that_is_not_there_is_unavailable_and_no_reason_not_to_start(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", f"{HOST}:{free_port()}")
    store = opened(adapters.job_store("firestore:away"))
    with pytest.raises(StoreUnavailable, match="refused"):
        await claimed(store, make_job())
    forget_firebase_app()


@pytest.fixture
def database(firestore_url: str, opened: Opened) -> Firestore:
    """Beside the store: what is really there."""
    return opened(Firestore(firestore_url))


@pytest.fixture
def session(database: Firestore) -> Any:
    return database.client.document("users/u/sessions/s")


@pytest.mark.emulator
async def test_a_session_document_keeps_the_apps_own_fields(firestore_url: str, opened: Opened, session: Any) -> None:
    session.set({"title": "cat", "a.b": 1, "meta": {"tags": ["x"]}, "processingError": {"code": "old", "more": 1}})
    mirror = opened(adapters.job_store(firestore_url))
    await mirror.write_session(
        running("a", 1, 10), {"processingStatus": "processing", "processingError": {"code": "new"}}
    )
    await mirror.write_session(ended("a", 2, 20.000001), {"processingStatus": "completed", "odd.name": 2})
    ours = {"processingStatus": "completed", "processingError": {"code": "new"}, "odd.name": 2}
    theirs = {"title": "cat", "a.b": 1, "meta": {"tags": ["x"]}}
    claim = {"jobId": "a", "fence": 2, "claimedAt": at(20.000001), "isFinal": True}
    assert session.get().to_dict() == {**ours, **theirs, CLAIM: claim}
    assert await mirror.read_session("u", "s") == {**ours, **theirs}


@pytest.mark.emulator
async def test_the_app_may_write_its_session_document_meanwhile(
    firestore_url: str, opened: Opened, session: Any
) -> None:
    mirror = opened(adapters.job_store(firestore_url))
    await mirror.write_session(running("a", 1, 10), {"processingStatus": "processing"})
    session.set({"processingStatus": "uploading", "title": "dog"}, merge=True)
    await mirror.write_session(running("a", 1, 10), {"processingProgress": 0.5})
    assert await mirror.read_session("u", "s") == {
        "processingStatus": "uploading",
        "processingProgress": 0.5,
        "title": "dog",
    }


@pytest.mark.emulator
async def test_progress_does_not_touch_the_job(firestore_url: str, opened: Opened, database: Firestore) -> None:
    store = opened(adapters.job_store(firestore_url))
    claim = claims.claim_of(await claimed(store, make_job()))
    document = database.client.document("jobs/edit-1")
    before = document.get().update_time
    await store.report(claim, Progress(step=1, steps=2))
    assert document.get().update_time == before


@pytest.mark.emulator
async def test_what_creates_a_job_while_another_is_counted_is_seen(firestore_url: str, opened: Opened) -> None:
    """The owner's document shows it, first made and then changed."""
    store, other = (opened(adapters.job_store(firestore_url)) for _ in range(2))
    loop, quota = asyncio.get_running_loop(), claims.Quota(unfinished=2, per_day=9)

    class Late(claims.Quota):
        """Checked once another process has created `rival`."""

        rival: str

        def check(self, *, unfinished: int, of_today: int) -> None:
            seen.append(unfinished)
            if len(seen) == 1:
                creation = other.create(make_job(self.rival, owner="a"), quota)
                asyncio.run_coroutine_threadsafe(creation, loop).result()
            super().check(unfinished=unfinished, of_today=of_today)

    seen: list[int] = []
    assert (await store.create(make_job("a", owner="a"), Late(unfinished=2, per_day=9, rival="b")))[1]
    assert seen == [0, 1]
    await store.delete("b")
    seen.clear()
    with pytest.raises(QuotaExceeded):
        await store.create(make_job("c", owner="a"), Late(unfinished=2, per_day=9, rival="d"))
    assert seen == [1, 2] and await store.get("c") is None


@pytest.mark.emulator
async def test_keys_that_firestore_does_not_take_are_stored(firestore_url: str, opened: Opened) -> None:
    store, mirror = opened(adapters.job_store(firestore_url)), opened(adapters.job_store(firestore_url))
    for id in ("__edit__", "a/b", "é" * 1000, ".."):
        assert (await claimed(store, make_job(id, session_id=""))).id == id
        job = await store.get(id)
        assert job and job.id == id
    await mirror.write_session(running("a", 1, 10).evolve(user_id="__u__", session_id="__s__"), {"jobId": "a"})
    assert await mirror.read_session("__u__", "__s__") == {"jobId": "a"}


@pytest.mark.emulator
async def test_a_value_error_of_a_change_is_its_own(firestore_url: str, opened: Opened) -> None:
    def fail(_job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await opened(adapters.job_store(firestore_url)).update("edit-1", KEY, fail)


@pytest.mark.emulator
async def test_databases_of_a_project_are_apart(firestore_url: str, opened: Opened) -> None:
    store, other = (opened(adapters.job_store(url)) for url in (firestore_url, f"{firestore_url}?database=other"))
    await claimed(other, make_job())
    assert await store.get("edit-1") is None
    assert [job.id for job in await other.list()] == ["edit-1"]


@pytest.fixture
async def gated(firestore_url: str, firestore_address: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gate]:
    """Before the emulator, which the environment names by it."""
    async with gate(int(firestore_address.rpartition(":")[2])) as made:
        monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", f"{HOST}:{made.port}")
        yield made


async def refused(store: JobStore) -> list[type]:
    """What each kind of call raises."""
    claim = claims.Claim(job_id="edit-1", lock_key=KEY, fence=1)
    outcomes = await asyncio.gather(
        store.get("edit-1"),
        store.list(status=State.RUNNING),
        store.list(owes_by=at(0)),
        store.update("edit-1", KEY, put()),
        store.report(claim, Progress()),
        store.create(make_job(owner="a"), claims.Quota(unfinished=1, per_day=1)),
        store.ahead(make_job()),
        return_exceptions=True,
    )
    return [type(outcome) for outcome in outcomes]


@pytest.mark.emulator
async def test_a_server_that_comes_back_is_used_again(firestore_url: str, gated: Gate, opened: Opened) -> None:
    store = opened(adapters.job_store(firestore_url))
    job = await claimed(store, make_job())
    await gated.close()
    assert await refused(store) == [StoreUnavailable] * 7
    await gated.open()
    assert await store.get(job.id) == job


@pytest.mark.emulator
async def test_a_server_that_says_nothing_is_unavailable(
    firestore_url: str, gated: Gate, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(adapters.job_store(firestore_url))
    job = await claimed(store, make_job())
    gated.flows.clear()
    with monkeypatch.context() as short:
        short.setattr(firestore_database, "CALL_TIMEOUT_S", 0.5)
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await store.update("edit-1", KEY, put())
    gated.flows.set()
    assert await store.get(job.id) == job


@pytest.mark.emulator
async def test_an_update_that_took_too_long_is_not_stored(
    firestore_url: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = (opened(adapters.job_store(firestore_url)) for _ in range(2))
    assert await store.get("edit-1") is None
    slow = Slow()
    with monkeypatch.context() as short:
        short.setattr(firestore_database, "CALL_TIMEOUT_S", 0.5)
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await store.update("edit-1", KEY, slow)
    slow.go_on.set()
    await asyncio.to_thread(store.close)  # type: ignore[attr-defined] # it waits for its threads
    assert await other.get("edit-1") is None


class LosesReply(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc] # publishes no types
    """A network that loses the answer to the first commit."""

    def __init__(self) -> None:
        self.commits = 0

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        answer = continuation(details, request)
        if details.method.endswith("/Commit"):
            self.commits += 1
            if self.commits == 1:
                answer.result()
                return Lost()
        return answer


class Lost(grpc.RpcError, grpc.Call):  # type: ignore[misc] # publishes no types
    code = staticmethod(lambda: grpc.StatusCode.UNAVAILABLE)
    details = staticmethod(lambda: "the answer was lost")
    trailing_metadata = staticmethod(tuple)

    def result(self) -> None:
        raise self


@pytest.mark.emulator
async def test_a_commit_whose_answer_was_lost_is_not_tried_again(firestore_url: str, opened: Opened) -> None:
    """The change would meet what it has stored itself."""
    store, network = opened(adapters.job_store(firestore_url)), LosesReply()
    client = store._database.client  # type: ignore[attr-defined] # the way to its network
    client._channel = grpc.intercept_channel(client._channel, network)
    runs: list[Job | None] = []

    def change(job: Job | None, _rivals: Sequence[Job], _now: datetime) -> Sequence[Job]:
        runs.append(job)
        return (make_job(),)

    with pytest.raises(StoreUnavailable, match="the answer was lost"):
        await store.update("edit-1", KEY, change)
    assert runs == [None] and network.commits == 1
    assert await store.get("edit-1") == make_job()

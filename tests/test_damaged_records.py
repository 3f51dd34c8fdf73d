"""Stored records that cannot be read, whoever wrote them: each is an error of ours, and holds up nothing else."""

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa

from serve_app import adapters
from serve_app.adapters.stores.firestore_database import Firestore
from serve_app.adapters.stores.sql_tables import CANCELLATIONS, JOBS, SESSIONS
from serve_app.errors import StoreUnavailable
from serve_app.jobs.claims import claim_of
from serve_app.jobs.ports import JobStore
from serve_app.jobs.record import State
from serve_app.models import Progress

from .backends import at, make_job
from .job_servers import Opened, plain
from .test_job_stores import KEY, claimed, owing, put


def replace(url: str, document: str, field: str, table: sa.Table, value: object) -> None:
    """Write into a field as nobody should."""
    if url.startswith("firestore:"):
        database = Firestore(url)
        database.client.document(document).update({field: value})
        database.close()
    else:
        with plain(url) as connection:
            connection.execute(table.update().values({field: value}).where(*_one(table)))


def _one(table: sa.Table) -> list[sa.ColumnElement[bool]]:
    return [JOBS.c.id == "bad"] if table is JOBS else []


RECORDS: Mapping[str, Callable[[str], object]] = {
    "no JSON": lambda _: "{",
    "nothing": lambda _: "",
    "null": lambda _: "null",
    "a list": lambda _: "[1]",
    "a state that is none": lambda record: record.replace('"queued"', '"resting"'),
    "a moment without a time zone": lambda record: record.replace("Z", ""),
    "a text for a number": lambda record: record.replace('"seed":1', '"seed":"one"'),
}


@pytest.mark.parametrize("what", RECORDS)
async def test_a_damaged_job_record_is_named_and_left_out(what: str, kept_url: str, opened: Opened) -> None:
    store = opened(adapters.job_store(kept_url))
    bad = owing("bad", 1).evolve(status=State.QUEUED)
    await store.update("bad", "", put(bad, owing("good", 2)))
    replace(kept_url, "jobs/bad", "record", JOBS, RECORDS[what](bad.model_dump_json()))
    await unreadable(store)


@pytest.mark.emulator
@pytest.mark.parametrize("record", [5, None, {"id": "bad"}, b"{}"])
async def test_a_record_that_is_no_text_is_named_and_left_out(
    record: object, firestore_url: str, opened: Opened
) -> None:
    store = opened(adapters.job_store(firestore_url))
    await store.update("bad", "", put(owing("bad", 1).evolve(status=State.QUEUED), owing("good", 2)))
    replace(firestore_url, "jobs/bad", "record", JOBS, record)
    await unreadable(store)


async def test_a_record_that_is_no_unicode_is_unavailable(sqlite_url: str, opened: Opened) -> None:
    store = opened(adapters.job_store(sqlite_url))
    await store.update("bad", "", put(make_job("bad")))
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:"))) as connection, connection:
        connection.execute("UPDATE jobs SET record = CAST(x'ff' AS TEXT)")
    with pytest.raises(StoreUnavailable):
        await store.get("bad")


async def unreadable(store: JobStore) -> None:
    """The job `bad` cannot be read, and `good` can."""
    with pytest.raises(StoreUnavailable, match="record of job bad"):
        await store.get("bad")
    for lock_key in (KEY, ""):
        with pytest.raises(StoreUnavailable, match="record of job bad"):
            await store.update("bad", lock_key, put())
    for query in ({}, {"lock_key": KEY}, {"owes_by": at(9)}):
        assert [job.id for job in await store.list(**query)] == ["good"]


@pytest.mark.emulator
@pytest.mark.parametrize(
    "reported", [{"step": "one"}, {"steps": None}, {"hue": 1}, {"fence": "first"}, {"fence": None}], ids=str
)
async def test_damaged_progress_is_none(reported: Mapping[str, object], firestore_url: str, opened: Opened) -> None:
    store = opened(adapters.job_store(firestore_url))
    job = await claimed(store, make_job("bad"))
    await store.report(claim_of(job), Progress(step=1, steps=28))
    [(field, value)] = reported.items()
    replace(firestore_url, "jobProgress/bad", field, JOBS, value)
    assert await store.get("bad") == job
    assert [*await store.list()] == [job]
    await store.report(claim_of(job), Progress(step=2, steps=28))
    assert await store.get("bad") == job.evolve(progress=Progress(step=2, steps=28))


async def test_a_damaged_cancellation_is_unavailable(kept_url: str, opened: Opened) -> None:
    store = opened(adapters.job_store(kept_url))
    await store.cancel_until(KEY, at(1))
    # No clock goes so far.
    replace(kept_url, "cancellations/u%2Fs", "until", CANCELLATIONS, 1e300)
    with pytest.raises(StoreUnavailable):
        await store.canceled_until(KEY)


@pytest.mark.emulator
@pytest.mark.parametrize("until", ["soon", None])
async def test_a_cancellation_that_is_no_moment_is_unavailable(
    until: object, firestore_url: str, opened: Opened
) -> None:
    store = opened(adapters.job_store(firestore_url))
    await store.cancel_until(KEY, at(1))
    replace(firestore_url, "cancellations/u%2Fs", "until", CANCELLATIONS, until)
    for work in (store.canceled_until(KEY), store.cancel_until(KEY, at(2))):
        with pytest.raises(StoreUnavailable, match="cannot be read"):
            await work


@pytest.mark.parametrize("document", ["{", "null", '{"job_id": "edit-1"}'])
async def test_a_damaged_session_document_is_unavailable(document: str, sql_url: str, opened: Opened) -> None:
    mirror = opened(adapters.job_store(sql_url))
    await mirror.write_session(make_job(), {"a": 1})
    replace(sql_url, "", "document", SESSIONS, document)
    for work in (mirror.write_session(make_job(), {"a": 2}), mirror.read_session("u", "s")):
        with pytest.raises(StoreUnavailable, match="session document"):
            await work


@pytest.mark.emulator
@pytest.mark.parametrize(
    "claim", [5, "x", [1], {}, {"jobId": "edit-1"}, {"jobId": 1, "fence": "x", "claimedAt": "now", "isFinal": False}]
)
async def test_a_session_document_whose_claim_others_damaged_is_written_all_the_same(
    claim: object, firestore_url: str, opened: Opened
) -> None:
    """It is the app's own document: what an app writes there must not keep its users from seeing how a job ended."""
    mirror = opened(adapters.job_store(firestore_url))
    await mirror.write_session(make_job(), {"a": 1})
    replace(firestore_url, "users/u/sessions/s", "processingClaim", SESSIONS, claim)
    await mirror.write_session(make_job(), {"a": 2})
    assert await mirror.read_session("u", "s") == {"a": 2}


async def test_what_a_change_raises_is_not_the_stores(jobs_url: str, opened: Opened) -> None:
    """A fault of ours must not look like an outage, which would be waited for."""

    def fail(*_: object) -> Any:
        raise ArithmeticError("its own")

    store = opened(adapters.job_store(jobs_url))
    with pytest.raises(ArithmeticError, match="its own"):
        await store.update("edit-1", KEY, fail)
    assert await store.get("edit-1") is None

"""What a job store does with records of a newer version of this service, which it shares the store with."""

import pytest

from serve_app import adapters
from serve_app.adapters import job_records
from serve_app.errors import StoreUnavailable
from serve_app.jobs import Message, State
from serve_app.ports import JobStore

from .backends import at, make_job
from .job_servers import Opened, add_field, set_record
from .test_job_stores import KEY, claimed, owing, put


@pytest.fixture
async def shared(kept_url: str, opened: Opened) -> JobStore:
    """A store with two jobs of a session, of which a newer version has written `newer`."""
    store = opened(adapters.job_store(kept_url))
    records = [owing("older", 1), owing("newer", 2).evolve(created_at=at(2), status=State.QUEUED)]
    await store.update("newer", KEY, put(*records))
    add_field(kept_url, "newer")
    return store


async def test_a_record_that_cannot_be_read_is_left_out_of_lists(
    shared: JobStore, caplog: pytest.LogCaptureFixture
) -> None:
    job_records._log_unreadable.cache_clear()
    for query in ({}, {"limit": 1}, {"session_key": KEY, "limit": 1}, {"owes_by": at(9)}):
        assert [job.id for job in await shared.list(**query)] == ["older"]
    (line,) = [line for line in caplog.records if "newer" in line.getMessage()]
    assert vars(line)["action"] == "record_unreadable" and vars(line)["job_id"] == "newer"


async def test_a_record_that_cannot_be_read_is_named(shared: JobStore) -> None:
    by_another = "job newer was written by another version .* cannot read hue"
    with pytest.raises(StoreUnavailable, match=by_another):
        await shared.get("newer")
    for id, session_key in (("newer", KEY), ("newer", "")):
        with pytest.raises(StoreUnavailable, match=by_another):
            await shared.update(id, session_key, put())
    await shared.delete("newer")
    assert await shared.get("newer") is None


async def test_nothing_runs_beside_a_job_that_cannot_be_read(shared: JobStore) -> None:
    with pytest.raises(StoreUnavailable, match="job newer was written by another version"):
        await claimed(shared, make_job())
    assert await shared.get("edit-1") is None
    assert (await claimed(shared, make_job(session_id="s2"))).attempt == 1


async def test_a_record_of_a_version_that_kept_no_message_is_read(kept_url: str, opened: Opened) -> None:
    """As it was written before jobs kept their messages."""
    store = opened(adapters.job_store(kept_url))
    new_fields = {"message", "redispatch_s", "asked_at", "not_before", "waiting_since", "versions"}
    old = make_job("old", status=State.RUNNING, fence=1, attempt=1, lease_until=at(5), started_at=at(1))
    await store.update("old", KEY, put(old))
    set_record(kept_url, "old", old.model_dump_json(exclude=new_fields))
    assert await store.get("old") == old
    again = await claimed(store, make_job("old", message=Message(data="{}", attributes={}), asked_at=at(3)), 10)
    assert (again.attempt, again.message and again.message.data, again.owed.keys()) == (2, "{}", {"dispatch"})

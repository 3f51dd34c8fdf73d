"""What a job store does with records of a newer version of this service, which it shares the store with."""

import json
from pathlib import Path

import pytest

from serve_app import adapters
from serve_app.adapters.stores import records as job_records
from serve_app.errors import Busy, StoreUnavailable
from serve_app.jobs.ports import JobStore
from serve_app.jobs.record import Artifact, Job, Message, State
from serve_app.parameters import CropStrategy, EditParameters, Matrix

from .backends import at, make_job
from .job_servers import Opened, add_field, set_record
from .test_job_stores import KEY, claimed, owing, put

#: Records of version 0.1.
RECORDS = Path(__file__).parent / "records"
OTHERS = EditParameters(prompt="q", guidance_scale=2.0, steps=4, crop_strategy=CropStrategy.CROP)


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
    for query in ({}, {"limit": 1}, {"lock_key": KEY, "limit": 1}, {"owes_by": at(9)}):
        assert [job.id for job in await shared.list(**query)] == ["older"]
    (line,) = [line for line in caplog.records if "newer" in line.getMessage()]
    assert vars(line)["action"] == "record_unreadable" and vars(line)["job_id"] == "newer"


async def test_a_record_that_cannot_be_read_is_named(shared: JobStore) -> None:
    by_another = "job newer was written by another version .* cannot read hue"
    with pytest.raises(StoreUnavailable, match=by_another):
        await shared.get("newer")
    for id, lock_key in (("newer", KEY), ("newer", "")):
        with pytest.raises(StoreUnavailable, match=by_another):
            await shared.update(id, lock_key, put())
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
    new_fields = {"message", "redispatch_s", "asked_at", "not_before", "waiting_since"}
    old = make_job("old", status=State.RUNNING, fence=1, attempt=1, lease_until=at(5), started_at=at(1))
    await store.update("old", KEY, put(old))
    set_record(kept_url, "old", old.model_dump_json(exclude=new_fields))
    assert await store.get("old") == old
    again = await claimed(store, make_job("old", message=Message(data="{}", attributes={}), asked_at=at(3)), 10)
    assert (again.attempt, again.message and again.message.data, again.owed.keys()) == (2, "{}", {"dispatch"})


async def test_a_record_of_a_version_that_posted_no_jobs_goes_on(kept_url: str, opened: Opened) -> None:
    """As it was written before jobs had owners and events, and artifacts numbers, seeds and sizes."""
    store = opened(adapters.job_store(kept_url))
    artifact = {"role", "path", "version", "content_type", "size_bytes"}
    old = make_job("old", status=State.RUNNING, fence=1, attempt=1, lease_until=at(5), started_at=at(1))
    old = old.evolve(artifacts=(Artifact(role="edited", path="e", version="7", content_type="a/b", size_bytes=3),))
    fields = json.loads(old.model_dump_json(exclude={"owner", "events"}))
    fields["artifacts"] = [{name: one[name] for name in artifact} for one in fields["artifacts"]]
    await store.update("old", KEY, put(old))
    set_record(kept_url, "old", json.dumps(fields))
    assert await store.get("old") == old
    assert await store.create(make_job("old", owner="key")) == (old, False)
    again = await claimed(store, make_job("old"), 10)
    assert [(event.number, event.status) for event in again.events] == [(1, State.QUEUED), (2, State.RUNNING)]
    assert (again.owner, again.artifacts) == ("", old.artifacts)


@pytest.mark.parametrize("name", ["running", "succeeded"])
def test_a_record_is_read_as_it_was_stored_before_jobs_had_kinds(name: str) -> None:
    job = Job.model_validate_json((RECORDS / f"{name}.json").read_text())
    assert (job.type, job.lock_key, job.parameters) == ("inpaint", KEY, make_job().parameters)
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_a_growth_that_was_not_asked_for_is_left_out_of_a_record() -> None:
    """So that the version before reads it."""
    edit = make_job().parameters
    assert "mask_grow" not in edit.model_dump() and "mask_grows" not in Matrix().model_dump()
    given = edit.model_copy(update={"mask_grow": 0.0}), Matrix(mask_grows=(0.0,))
    for one in given:
        assert type(one).model_validate_json(one.model_dump_json()) == one


async def test_a_job_that_runs_while_the_service_is_replaced_goes_on(kept_url: str, opened: Opened) -> None:
    """As an older version stored it: its lease holds, and is followed by the next attempt of the same parameters."""
    store = opened(adapters.job_store(kept_url))
    for id, name, status in (("edit-1", "running", State.RUNNING), ("edit-2", "succeeded", State.SUCCEEDED)):
        await store.update(id, KEY, put(make_job(id, status=status, fence=1)))
        set_record(kept_url, id, (RECORDS / f"{name}.json").read_text())
    with pytest.raises(Busy, match="edit-1 is running"):
        await claimed(store, make_job("edit-3"), 3)
    again = await claimed(store, make_job(parameters=OTHERS), 6)
    assert (again.attempt, again.fence, again.parameters) == (2, 2, make_job().parameters)
    assert await store.get("edit-1") == again
    done = await store.get("edit-2")
    assert done is not None and [(one.role, one.version) for one in done.artifacts] == [
        ("edited", "7"),
        ("preview", ""),
    ]
    assert done.paths["edited"] == "users/u/sessions/s/edited.jpg"
    assert {job.id for job in await store.list(lock_key=KEY)} == {"edit-1", "edit-2"}


@pytest.mark.parametrize("damage", ['"artifacts": 5', '"versions": []', '"parameters": []', '"session_id": 5'])
def test_an_older_record_that_is_damaged_is_refused(damage: str) -> None:
    field = damage.partition(":")[0]
    record = (RECORDS / "succeeded.json").read_text()
    whole = json.loads(record) | json.loads(f"{{{damage}}}")
    with pytest.raises(StoreUnavailable, match=f"cannot read .*{field.strip(chr(34))}"):
        job_records.read_record("edit-2", json.dumps(whole))

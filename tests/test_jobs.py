"""The state machine, and the rules by which a claim is taken, kept and given up."""

import itertools
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.edit.job import edit_job_id, seed_of
from serve_app.errors import Busy, IllegalTransition, OtherVariant, StaleClaim, UnknownJob
from serve_app.jobs import claims
from serve_app.jobs import record as records
from serve_app.jobs.claims import Change, claim_of
from serve_app.jobs.messages import EditMessage
from serve_app.jobs.record import HEAD_START_S, TRANSITIONS, Artifact, Cause, Job, JobError, State
from serve_app.models import Progress
from serve_app.parameters import CropStrategy

from .backends import at, make_job

EDITED = Artifact(role="edited", path="e")
ALL_EDGES = list(itertools.product(State, Cause))
LEASE_S = 60
ERROR = JobError(code="x", message="y")


#: A change at a moment of the test's own.
Dated = Callable[[Job | None, Sequence[Job]], Sequence[Job]]


def dated(change: Change, second: float) -> Dated:
    return lambda stored, rivals: change(stored, rivals, at(second))


def claim(job: Job, second: float = 0, max_attempts: int = 5) -> Dated:
    return dated(claims.claim(job, lease_s=LEASE_S, max_attempts=max_attempts), second)


def claimed(job: Job | None = None, second: float = 0) -> Job:
    job = job or make_job()
    [record] = claim(job, second)(None, ())
    return record


def one(records: Sequence[Job]) -> Job:
    [record] = records
    return record


# The state machine


@pytest.mark.parametrize(("state", "cause"), ALL_EDGES, ids=lambda value: value.value)
def test_every_pair_of_state_and_cause(state: State, cause: Cause) -> None:
    job = make_job(status=state, lease_until=at(1))
    to = TRANSITIONS.get((state, cause))
    if to is None:
        with pytest.raises(IllegalTransition, match=f"edit-1 is {state} and cannot be {cause}"):
            job.after(cause, at(5))
    else:
        after = job.after(cause, at(5))
        assert after.status == to
        assert after.lease_until == (at(1) if to == State.RUNNING else None)


def test_final_states_have_no_way_out_but_when_somebody_asks() -> None:
    ways_out = {edge for edge in TRANSITIONS if edge[0].is_final}
    assert ways_out == {
        (State.FAILED, Cause.REPLAYED),
        (State.FAILED, Cause.ASKED_AGAIN),
        (State.CANCELED, Cause.ASKED_AGAIN),
        (State.EXPIRED, Cause.ASKED_AGAIN),
        (State.FAILED, Cause.RESUMED),
        (State.CANCELED, Cause.RESUMED),
        (State.SUCCEEDED, Cause.RESUMED),
    }
    assert {state for state in State if state.is_final} == set(State) - {State.QUEUED, State.RUNNING}


def test_a_replayed_job_starts_anew_and_shuts_its_old_worker_out() -> None:
    failed = make_job(status=State.RUNNING, attempt=5, fence=5, started_at=at(1)).after(
        Cause.EXHAUSTED, at(2), error=JobError(code="replica_lost", message=""), dead_lettered=True
    )
    [again] = claims.replay(failed, (), at(3))
    assert (again.status, again.attempt, again.fence, again.error) == (State.QUEUED, 0, 6, None)
    assert (again.dead_lettered, again.finished_at, again.owed.keys()) == (False, None, {"dispatch"})
    assert again.parameters == failed.parameters


@pytest.mark.parametrize("state", [state for state in State if state != State.FAILED])
def test_only_a_failed_job_is_replayed(state: State) -> None:
    assert claims.replay(make_job(status=state), (), at(3)) == ()


def claimed_at(second: float, asked: float | None, **wishes: object) -> Dated:
    asked_at = None if asked is None else at(asked)
    new = make_job(**{"deadline": at(1000), "traceparent": "new", "asked_at": asked_at, **wishes})
    return dated(claims.claim(new, lease_s=60, max_attempts=5, claimer="me"), second)


def ended(status: State, **changes: object) -> Job:
    """A job whose message was published at 10, and that ended at 100."""
    error = JobError(code="c", message="")
    of_the_end = {"fence": 3, "attempt": 4, "finished_at": at(100), "error": error, "waiting_since": at(20)}
    return make_job(**{"status": status, "asked_at": at(10), "deadline": at(90), **of_the_end, **changes})


@pytest.mark.parametrize("asked", [100.000001, 150])
@pytest.mark.parametrize("state", [State.CANCELED, State.EXPIRED, State.FAILED])
def test_who_asks_again_after_the_end_gets_another_run(state: State, asked: float) -> None:
    [again] = claimed_at(200, asked)(ended(state, dead_lettered=True), ())
    assert (again.status, again.attempt, again.fence, again.error) == (State.RUNNING, 1, 4, None)
    assert (again.deadline, again.traceparent, again.asked_at) == (at(1000), "new", at(asked))
    assert (again.dead_lettered, again.waiting_since, again.finished_at) == (False, None, None)
    assert again.owed.keys() == {"dispatch"}


@pytest.mark.parametrize("asked", [None, 10, 50, 100])
@pytest.mark.parametrize("state", [State.CANCELED, State.FAILED])
def test_a_message_from_before_the_end_is_a_duplicate(state: State, asked: float | None) -> None:
    assert claimed_at(200, asked)(ended(state), ()) == ()


@pytest.mark.parametrize("state", [State.CANCELED, State.FAILED])
def test_the_same_message_never_asks_again_whatever_the_clocks_say(state: State) -> None:
    """The broker's clock is ahead of the store's: the message seems to come from after the end."""
    over = ended(state, asked_at=at(105))
    assert claimed_at(200, 105)(over, ()) == ()
    assert claimed_at(200, 104)(over, ()) == (), "nor does an older one"
    assert claimed_at(200, 105.000001)(over, ()) != ()


@pytest.mark.parametrize("deadline", [None, at(200.000001)])
def test_a_later_deadline_is_used_also_when_it_was_sent_before_the_first_was_over(deadline: object) -> None:
    [again] = claimed_at(200, asked=50, deadline=deadline)(ended(State.EXPIRED), ())
    assert (again.status, again.deadline, again.attempt) == (State.RUNNING, deadline, 1)


def test_an_expired_job_stays_so_without_a_newer_message_in_time() -> None:
    assert claimed_at(200, asked=50, deadline=at(200))(ended(State.EXPIRED), ()) == (), "it would expire again"
    for asked in (None, 5, 10):
        assert claimed_at(200, asked)(ended(State.EXPIRED), ()) == ()


@pytest.mark.parametrize("state", [State.CANCELED, State.FAILED])
def test_a_message_whose_own_deadline_is_over_asks_for_nothing(state: State) -> None:
    assert claimed_at(200, asked=150, deadline=at(199))(ended(state), ()) == ()


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING])
def test_a_job_that_waits_takes_a_newer_messages_wishes(state: State) -> None:
    waits = make_job(status=state, asked_at=at(10), deadline=at(90), lease_until=at(60), callback_url="old", attempt=1)
    [newer] = claimed_at(80, asked=20, callback_url="new")(waits, ())
    assert (newer.deadline, newer.callback_url, newer.traceparent) == (at(1000), "new", "new")
    assert (newer.asked_at, newer.attempt) == (at(20), 2)
    [older] = claimed_at(80, asked=10, callback_url="new")(waits, ())
    assert (older.deadline, older.callback_url, older.asked_at) == (at(90), "old", at(10))
    [late] = claimed_at(80, asked=20, deadline=at(79))(waits, ())
    assert (late.status, late.deadline, late.asked_at) == (State.RUNNING, at(90), at(10)), "it must not expire the job"


def test_a_job_that_expires_at_its_claim_does_so_by_the_newest_deadline() -> None:
    waits = make_job(asked_at=at(10), deadline=at(90))
    [expired] = claimed_at(95, asked=10)(waits, ())
    assert (expired.status, expired.claimed_by) == (State.EXPIRED, "me")
    [runs] = claimed_at(95, asked=20)(waits, ())
    assert runs.status == State.RUNNING


def test_what_succeeded_is_a_duplicate_whenever_it_is_asked_for() -> None:
    assert claimed_at(200, asked=150)(ended(State.SUCCEEDED), ()) == ()


def test_a_first_claim_notes_when_it_was_asked_for() -> None:
    [first] = claimed_at(200, asked=150)(None, ())
    assert (first.asked_at, first.created_at) == (at(150), at(200))


@pytest.mark.parametrize("status", [State.QUEUED, State.RUNNING])
def test_a_job_whose_worker_died_on_a_photo_since_replaced_is_superseded(status: State) -> None:
    dead = make_job("edit-old", request="r", status=status, fence=2, attempt=1, lease_until=at(10), started_at=at(1))
    new = make_job("edit-new", request="r")
    claimed, old = claims.claim(new, lease_s=60, max_attempts=5)(None, [dead], at(100))
    assert (claimed.id, claimed.status, old.status) == ("edit-new", State.RUNNING, State.CANCELED)
    assert old.error is not None and old.error.code == "superseded"
    assert old.fence > dead.fence and old.owed


def test_a_queued_job_whose_message_is_a_finished_one_now_is_superseded() -> None:
    done = make_job("edit-new", request="r", status=State.SUCCEEDED, finished_at=at(50))
    replayed = make_job("edit-old", request="r", fence=3)
    other = make_job("edit-other", request="q")
    [old] = claims.claim(done, lease_s=60, max_attempts=5)(done, [replayed, other], at(100))
    assert (old.id, old.status) == ("edit-old", State.CANCELED)


def test_a_claim_is_disowned_by_its_claimer_only() -> None:
    [claimed] = claimed_at(1, None)(None, ())
    assert claims.release("somebody else")(claimed, (), at(2)) == ()
    [queued] = claims.release("me")(claimed, (), at(2))
    assert (queued.status, queued.attempt, queued.lease_until) == (State.QUEUED, 0, None)
    assert claims.release("me")(queued, (), at(2)) == ()
    assert claims.release("me")(None, (), at(2)) == ()


def test_a_job_that_is_replayed_by_its_record_owes_its_message() -> None:
    failed = make_job(status=State.FAILED, attempt=5, fence=7, dead_lettered=True)
    [again] = claims.resend(failed, (), at(3))
    assert (again.status, again.attempt, again.fence, again.dead_lettered) == (State.QUEUED, 0, 8, False)
    assert again.owed["dispatch"].due_at == at(3 + HEAD_START_S["dispatch"])


@pytest.mark.parametrize("state", [state for state in State if state != State.FAILED])
def test_what_has_not_failed_is_not_replayed_by_its_record(state: State) -> None:
    with pytest.raises(IllegalTransition):
        claims.resend(make_job(status=state), (), at(3))


def test_a_job_that_nobody_knows_is_not_replayed() -> None:
    with pytest.raises(UnknownJob):
        claims.replay(None, (), at(3))


def test_every_cause_names_an_edge_and_every_state_is_reached() -> None:
    assert {cause for _, cause in TRANSITIONS} == set(Cause)
    assert set(TRANSITIONS.values()) == set(State)


def test_the_diagram_shows_the_table() -> None:
    diagram = (records.__doc__ or "").split("\n\n", 1)[1]
    drawn = {}
    # An arrow with its causes on it starts at the box before it, or at the trunk that leaves `running`.
    for source, causes, target in re.findall(r"(\w+)? ?[├└]?──([\w, ]+)──► (\w+)", diagram):
        for cause in causes.split(", "):
            drawn[State(source or "running"), Cause(cause)] = State(target)
    # The way back to `queued` has its causes on lines of their own.
    for cause in re.findall(r"^ *(?:└─)?(\w+)(?:,.*)?$", diagram, re.MULTILINE):
        drawn[State.RUNNING, Cause(cause)] = State.QUEUED
    assert drawn == TRANSITIONS


# The message of a job that is not over


def due_at(job: Job) -> datetime:
    return job.owed["dispatch"].due_at


def test_a_claim_and_what_puts_a_job_back_push_its_message_on() -> None:
    job = claimed(make_job(redispatch_s=100), 5)
    assert due_at(job) == at(105)
    for second, (change, _) in enumerate(PUT_BACK.values(), start=50):
        assert due_at(one(change(claim_of(job))(job, (), at(second)))) == at(second + 100)
    assert due_at(one(claims.release(job.claimed_by)(job, (), at(70)))) == at(170)
    _, lost = claim(make_job(), 5 + LEASE_S)(None, (job.evolve(id="rival"),))
    assert due_at(lost) == at(105 + LEASE_S)


def test_a_renewal_rewrites_nothing_but_the_lease() -> None:
    job = claimed(make_job(redispatch_s=100))
    renewed = one(claims.renew(claim_of(job), lease_s=LEASE_S)(job, (), at(20)))
    assert renewed == job.evolve(lease_until=at(20 + LEASE_S))


def take_dispatch(job: Job, second: float) -> Sequence[Job]:
    return claims.take_notifications("me", ["dispatch"], wait_s=lambda _debt, n: 10 * n)(job, (), at(second))


def test_a_job_under_a_live_lease_is_heard_of_whatever_it_owes() -> None:
    job = claimed(make_job(redispatch_s=100)).evolve(lease_until=at(130))
    assert take_dispatch(job, 99) == ()
    put_off = one(take_dispatch(job, 101))
    assert put_off == job.evolve(owed={"dispatch": records.Due(due_at=at(230))})
    dead = one(take_dispatch(job, 130))
    assert dead.owed == {"dispatch": records.Due(due_at=at(140), attempts=1, taken_by="me")}


def test_a_waiting_job_whose_message_is_lost_ends_unless_it_has_moved_on() -> None:
    for status in (State.QUEUED, State.RUNNING):
        found = make_job(status=status, fence=3)
        failed = one(claims.fail_lost(found, "gone")(found, (), at(9)))
        assert (failed.status, failed.fence, failed.error) == (
            State.FAILED,
            4,
            JobError(code="message_lost", message="gone"),
        )
        assert claims.fail_lost(found, "gone")(found.evolve(fence=4), (), at(9)) == ()
        assert claims.fail_lost(found, "gone")(failed, (), at(9)) == ()
        assert claims.fail_lost(found, "gone")(found.evolve(status=State.SUCCEEDED), (), at(9)) == ()
        assert claims.fail_lost(found, "gone")(None, (), at(9)) == ()


def test_a_record_without_its_message_takes_the_next_ones() -> None:
    message = records.Message(data="{}", attributes={})
    [again] = claimed_at(5, asked=None, message=message)(make_job(message=None), ())
    assert again.message == message
    [kept] = claimed_at(5, asked=None, message=message)(make_job(message=message.model_copy(update={"data": "1"})), ())
    assert kept.message and kept.message.data == "1", "no newer one"


# Posted jobs


def posted(**changes: object) -> Job:
    return claims.posted(make_job(redispatch_s=100, **changes), at(5))


def test_a_posted_job_owes_its_message_and_says_when_it_was_asked_for() -> None:
    job = posted(owner="key")
    assert (job.status, job.created_at, job.asked_at, job.owner) == (State.QUEUED, at(5), at(5), "key")
    assert job.owed == {"dispatch": records.Due(due_at=at(5 + records.HEAD_START_S["dispatch"]))}
    assert job.events == (records.Event(number=1, at=at(5), status=State.QUEUED),)


def test_a_message_that_was_published_is_owed_again_later() -> None:
    job = posted()
    sent = one(claims.mark_sent(job, ["dispatch"])(job, (), at(6)))
    assert sent == job.evolve(owed={"dispatch": records.Due(due_at=at(106))})
    assert claims.mark_sent(job, ["dispatch"])(one(claim(job, 6)(job, ())), (), at(7)) == (), "its worker has it"
    ended = one(claims.cancel(job, (), at(6)))
    assert claims.mark_sent(job, ["dispatch"])(ended, (), at(7)) == ()


def test_the_message_of_a_posted_job_asks_for_nothing_new() -> None:
    job = posted()
    canceled = one(claims.cancel(job, (), at(9)))
    assert claim(job, 10)(canceled, ()) == ()


def test_each_artifact_is_recorded_by_the_claim_that_holds() -> None:
    job = one(claim(posted(), 6)(posted(), ()))
    first, second = (Artifact(role="image", path=str(i), index=i, seed=i, width=8, height=8) for i in range(2))
    for second_s, artifact in ((7, first), (8, second)):
        job = one(claims.record(claim_of(job), artifact)(job, (), at(second_s)))
    assert job.artifacts == (first, second) and job.status == State.RUNNING
    assert [(event.number, event.at, event.cause, event.artifact) for event in job.events] == [
        (1, at(5), None, None),
        (2, at(6), Cause.CLAIMED, None),
        (3, at(7), None, 0),
        (4, at(8), None, 1),
    ]
    lost = claim_of(job)
    again = one(claim(job, 6 + LEASE_S)(job, ()))
    assert again.artifacts == (first, second), "the next attempt goes on behind them"
    with pytest.raises(StaleClaim):
        claims.record(lost, first)(again, (), at(99))


def test_an_artifact_is_recorded_once_however_often_the_store_is_asked() -> None:
    job = one(claim(posted(), 6)(posted(), ()))
    change = claims.record(claim_of(job), Artifact(role="image", path="0", index=0))
    stored = one(change(job, (), at(7)))
    assert one(change(stored, (), at(8))) == stored


def test_a_deleted_job_is_not_claimed() -> None:
    with pytest.raises(UnknownJob):
        claim(posted(), 6)(None, ())


def test_a_claim_is_not_one_on_a_later_job_of_the_same_id() -> None:
    change = claims.claim(posted(), lease_s=LEASE_S, max_attempts=5, claimer="first")
    deleted = claim_of(one(change(posted(), (), at(6))))
    again = one(claims.claim(posted(), lease_s=LEASE_S, max_attempts=5, claimer="second")(posted(), (), at(7)))
    with pytest.raises(StaleClaim):
        claims.check_held(again, deleted)


def test_a_record_keeps_its_newest_events() -> None:
    job = posted()
    for second in range(records.MAX_EVENTS):
        job = job.noted(at(second), artifact=second)
    assert [event.number for event in job.events] == list(range(2, records.MAX_EVENTS + 2))


# Claims


def test_a_first_claim_runs_the_job() -> None:
    job = claimed(second=5)
    assert (job.status, job.attempt, job.fence) == (State.RUNNING, 1, 1)
    assert (job.started_at, job.lease_until) == (at(5), at(5 + LEASE_S))


def test_the_stored_parameters_win() -> None:
    stored = make_job(seed=7)
    again = make_job(seed=8, parameters=stored.parameters.model_copy(update={"steps": 1}))
    record = one(claim(again)(stored, ()))
    assert (record.seed, record.parameters) == (7, stored.parameters)


def test_a_live_lease_is_busy() -> None:
    job = claimed()
    with pytest.raises(Busy) as caught:
        claim(job, LEASE_S - 1)(job, ())
    assert caught.value.details["retry_after_s"] == 1


def test_a_lease_that_ran_out_is_taken_over_under_a_higher_number() -> None:
    job = claimed()
    again = one(claim(job, LEASE_S)(job, ()))
    assert (again.status, again.attempt, again.fence) == (State.RUNNING, 2, 2)
    with pytest.raises(StaleClaim):
        claims.renew(claim_of(job), lease_s=1)(again, (), at(LEASE_S))


def test_a_retry_forgets_the_error_of_the_last_attempt() -> None:
    job = claimed()
    queued = one(claims.retry(claim_of(job), error=ERROR, backoff_s=1)(job, (), at(0)))
    assert queued.error is not None
    assert one(claim(queued, 1)(queued, ())).error is None


@pytest.mark.parametrize("state", [state for state in State if state.is_final])
def test_a_duplicate_of_a_finished_job_changes_nothing(state: State) -> None:
    done = make_job(status=state)
    assert claim(make_job())(done, ()) == ()


def test_a_live_rival_is_busy_and_a_lost_one_is_fenced_out() -> None:
    rival = claimed(make_job("rival"))
    with pytest.raises(Busy, match="rival"):
        claim(make_job(), LEASE_S - 1)(None, (rival,))
    mine, lost = claim(make_job(), LEASE_S)(None, (rival,))
    assert (mine.id, mine.status) == ("edit-1", State.RUNNING)
    assert (lost.id, lost.status, lost.fence, lost.attempt) == ("rival", State.QUEUED, 2, 1)
    with pytest.raises(StaleClaim):
        claims.finish(claim_of(rival), Cause.SUCCEEDED)(lost, (), at(0))


def test_attempts_are_used_up() -> None:
    job = claimed()
    failed = one(claim(job, LEASE_S, max_attempts=1)(job, ()))
    assert (failed.status, failed.attempt) == (State.FAILED, 1)
    assert failed.error and failed.error.code == "attempts_exhausted"
    assert failed.fence > job.fence and failed.finished_at == at(LEASE_S)


def test_attempts_are_used_up_also_when_another_job_finds_the_lease_lost() -> None:
    rival = claimed(make_job("rival"))
    mine, lost = claim(make_job(), LEASE_S, max_attempts=1)(None, (rival,))
    assert mine.status == State.RUNNING
    assert (lost.status, lost.fence) == (State.FAILED, 2)


@pytest.mark.parametrize("running", [False, True])
def test_a_job_past_its_deadline_expires_instead(running: bool) -> None:
    job = make_job(deadline=at(30))
    stored = claimed(job) if running else job
    expired = one(claim(job, LEASE_S)(stored, ()))
    assert expired.status == State.EXPIRED and expired.finished_at == at(LEASE_S)
    assert expired.error and expired.error.code == "deadline_exceeded"
    assert expired.fence > stored.fence
    assert one(claim(job, 29.9)(None, ())).status == State.RUNNING
    assert one(claim(job, 30)(None, ())).status == State.EXPIRED, "its deadline is over from its very moment on"


@pytest.mark.parametrize("running", [False, True])
def test_a_job_that_is_attended_goes_on_and_expires_when_it_is_left(running: bool) -> None:
    job = make_job(deadline=at(30))
    attended = one(dated(claims.attend(30), 20)(claimed(job) if running else job, ()))
    assert attended.deadline == at(50)
    assert one(claim(attended, LEASE_S)(attended, ())).status == State.EXPIRED


def test_a_job_that_is_over_or_deleted_is_not_attended() -> None:
    over = one(claims.cancel(make_job(), (), at(1)))
    assert not dated(claims.attend(30), 2)(over, ()) and not dated(claims.attend(30), 2)(None, ())


def test_renewing_extends_the_lease() -> None:
    job = claimed()
    assert one(claims.renew(claim_of(job), lease_s=LEASE_S)(job, (), at(20))).lease_until == at(80)


@pytest.mark.parametrize("cause", [Cause.SUCCEEDED, Cause.REJECTED, Cause.EXHAUSTED, Cause.EXPIRED])
def test_finishing(cause: Cause) -> None:
    job = claimed()
    done = one(claims.finish(claim_of(job), cause, artifacts=(EDITED,))(job, (), at(9)))
    assert done.status.is_final and done.finished_at == at(9) and done.artifacts == (EDITED,)
    assert done.lease_until is None


PUT_BACK: dict[str, tuple[Callable[[claims.Claim], Change], int]] = {
    "retry": (lambda claim: claims.retry(claim, error=ERROR, backoff_s=1), 1),
    "give_back": (claims.requeue, 0),
    "wait": (lambda claim: claims.wait(claim, error=ERROR, limit_s=1), 0),
}


@pytest.mark.parametrize("how", PUT_BACK)
def test_putting_back_counts_only_attempts_that_were_the_jobs_fault(how: str) -> None:
    job = claimed()
    change, attempt = PUT_BACK[how]
    queued = one(change(claim_of(job))(job, (), at(0)))
    assert (queued.status, queued.attempt, queued.lease_until) == (State.QUEUED, attempt, None)
    with pytest.raises(StaleClaim):
        claims.finish(claim_of(job), Cause.SUCCEEDED)(queued, (), at(1))


def test_a_job_is_not_tried_before_its_backoff_is_over() -> None:
    job = claimed()
    queued = one(claims.retry(claim_of(job), error=ERROR, backoff_s=5)(job, (), at(10)))
    with pytest.raises(Busy) as caught:
        claim(make_job(), 14)(queued, ())
    assert caught.value.details["retry_after_s"] == 1
    again = one(claim(make_job(), 15)(queued, ()))
    assert (again.status, again.not_before) == (State.RUNNING, None)


def test_waiting_has_an_end_from_its_first_moment_on() -> None:
    job = claimed()
    for second in (10, 11, 19):
        queued = one(claims.wait(claim_of(job), error=ERROR, limit_s=10)(job, (), at(second)))
        assert (queued.status, queued.waiting_since, queued.error) == (State.QUEUED, at(10), ERROR)
        job = one(claim(queued, second)(queued, ()))
    failed = one(claims.wait(claim_of(job), error=ERROR, limit_s=10)(job, (), at(20)))
    assert (failed.status, failed.error, failed.finished_at) == (State.FAILED, ERROR, at(20))


def test_an_attempt_that_was_made_ends_the_wait() -> None:
    job = claimed()
    waits = one(claims.wait(claim_of(job), error=ERROR, limit_s=10)(job, (), at(0)))
    job = one(claim(waits, 1)(waits, ()))
    assert one(claims.retry(claim_of(job), error=ERROR, backoff_s=1)(job, (), at(2))).waiting_since is None
    assert one(claims.requeue(claim_of(job))(job, (), at(2))).waiting_since == at(0)


def test_a_job_stays_of_the_variant_it_was_first_claimed_with() -> None:
    queued = make_job(variant="old")
    with pytest.raises(OtherVariant) as caught:
        claim(make_job(variant="new"))(queued, ())
    assert caught.value.details["variant"] == "old"
    assert one(claim(make_job(variant="old"))(queued, ())).status == State.RUNNING


@pytest.mark.parametrize("status", [State.QUEUED, State.RUNNING])
def test_cancelling_fences_the_worker_out(status: State) -> None:
    job = claimed() if status == State.RUNNING else make_job()
    canceled = one(claims.cancel(job, (), at(1)))
    assert (canceled.status, canceled.finished_at) == (State.CANCELED, at(1))
    assert canceled.error and canceled.error.code == "canceled"
    with pytest.raises(StaleClaim) as caught:
        claims.check_held(canceled, claim_of(job))
    assert caught.value.details["status"] == State.CANCELED


@pytest.mark.parametrize("job", [None, *(make_job(status=state) for state in State if state.is_final)])
def test_cancelling_what_is_over_or_unknown_is_refused(job: Job | None) -> None:
    with pytest.raises(UnknownJob if job is None else IllegalTransition):
        claims.cancel(job, (), at(1))


def test_a_claim_on_a_job_that_is_gone_is_stale() -> None:
    with pytest.raises(StaleClaim) as caught:
        claims.finish(claim_of(claimed()), Cause.SUCCEEDED)(None, (), at(0))
    assert caught.value.details["status"] is None


def test_noting_the_dead_letter() -> None:
    failed = make_job(status=State.FAILED, fence=3)
    mark = claims.mark_dead_lettered(failed)
    assert one(mark(failed, (), at(9))) == failed.evolve(dead_lettered=True)
    assert mark(None, (), at(9)) == ()
    [replayed] = claims.replay(failed, (), at(3))
    assert mark(replayed, (), at(9)) == ()
    assert mark(replayed.evolve(status=State.FAILED), (), at(9)) == (), "it failed again, and wants a letter of its own"


@given(st.lists(st.sampled_from(["claim", "renew", "finish", "retry", "give_back", "wait", "cancel"]), max_size=12))
def test_the_fence_never_falls_and_only_the_last_claim_holds(steps: list[str]) -> None:
    stored: Job | None = None
    held: list[claims.Claim] = []
    for i, step in enumerate(steps):
        now = at(i * LEASE_S * 1.5)
        mine = held[-1] if held else claim_of(make_job(fence=99))
        change: Change = {
            "claim": claims.claim(make_job(), lease_s=LEASE_S, max_attempts=3),
            "renew": claims.renew(mine, lease_s=LEASE_S),
            "finish": claims.finish(mine, Cause.SUCCEEDED),
            "retry": claims.retry(mine, error=ERROR, backoff_s=LEASE_S),
            "give_back": claims.requeue(mine),
            "wait": claims.wait(mine, error=ERROR, limit_s=LEASE_S * 4),
            "cancel": claims.cancel,
        }[step]
        try:
            records = change(stored, (), now)
        except (Busy, StaleClaim, IllegalTransition, UnknownJob):
            continue
        for record in records:
            assert stored is None or record.fence >= stored.fence
            owed = {"session", "completion"} if record.status.is_final else {"dispatch"}
            assert record.owed.keys() == owed, "what is not over is heard of again"
            assert 0 <= record.attempt <= 3
            stored = record
        if step == "claim" and stored and stored.status == State.RUNNING:
            held.append(claim_of(stored))
        for stale in held[:-1]:
            with pytest.raises(StaleClaim):
                claims.check_held(stored, stale)


@pytest.mark.parametrize(
    "module",
    [
        "jobs/record",
        "jobs/claims",
        "jobs/worker",
        "jobs/lease",
        "jobs/notifications",
        "jobs/cancel",
        "adapters/stores/session_documents",
    ],
)
def test_no_rule_reads_a_hosts_clock(module: str) -> None:
    """The store says what time it is; lengths are counted on the monotonic clock."""
    source = Path(f"serve_app/{module}.py").read_text()
    assert not re.search(r"utc_now|\.(now|utcnow|today)\((?!\))|datetime\.now|time\.time\(|: Clock", source)


# The record


def test_a_record_survives_json() -> None:
    job = claimed(make_job(deadline=at(7.000001), seed=2**63 - 1))
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_progress_as_a_fraction() -> None:
    assert Progress().fraction == 0.0
    assert Progress(step=7, steps=28).fraction == 0.25


def test_log_context_names_the_job() -> None:
    assert claimed().log_context() == {
        "job_id": "edit-1",
        "lock_key": "u/s",
        "variant": "telea",
        "attempt": 1,
        "fence": 1,
    }


# Identity

explicit = st.fixed_dictionaries(
    {},
    optional={
        "variant": st.sampled_from(["telea", "Q8_0"]),
        "prompt": st.text(max_size=5),
        "guidanceScale": st.floats(0, 100),
        "steps": st.integers(1, 100),
        "seed": st.integers(0, 2**63 - 1),
        "cropStrategy": st.sampled_from(list(CropStrategy)),
        "strength": st.floats(0.01, 1),
        "maskGrow": st.floats(0, 0.05),
    },
)


def identity(fields: dict[str, object], versions: tuple[str, ...] = ("1", "2"), key: str | None = None) -> str:
    message = EditMessage.model_validate({"userId": "u", "sessionId": "s", **fields})
    return edit_job_id(message, versions=versions, idempotency_key=key)


@pytest.mark.slow
@given(explicit)
def test_a_message_that_is_published_again_asks_for_the_same(fields: dict[str, object]) -> None:
    message = EditMessage.model_validate({"userId": "u", "sessionId": "s", **fields})
    copy = EditMessage.model_validate_json(message.model_dump_json(by_alias=True, exclude_none=True))
    ids = {edit_job_id(one, versions=("1", "2"), idempotency_key=None) for one in (message, copy)}
    assert len(ids) == 1 and copy == message


@given(explicit, st.randoms())
def test_the_order_of_fields_does_not_matter(fields: dict[str, object], random: Random) -> None:
    shuffled = list(fields.items())
    random.shuffle(shuffled)
    assert identity(fields) == identity(dict(shuffled))


@given(explicit, explicit)
def test_every_explicit_parameter_matters(one: dict[str, object], other: dict[str, object]) -> None:
    assert (identity(one) == identity(other)) == (one == other)


@given(explicit)
def test_the_versions_matter_unless_a_key_replaces_them(fields: dict[str, object]) -> None:
    assert identity(fields, ("1", "2")) != identity(fields, ("1", "3"))
    assert identity(fields, ("1", "2"), "k") == identity(fields, ("1", "3"), "k")
    assert identity(fields, ("1", "2"), "k") != identity(fields, ("1", "2"), "l")
    assert identity(fields, ("12", "")) != identity(fields, ("1", "2"))


def test_user_and_session_matter() -> None:
    assert identity({"userId": "v"}) != identity({"sessionId": "v"}) != identity({})


def test_a_random_seed_is_the_same_as_none() -> None:
    assert identity({"seed": -1}) == identity({}) == identity({"seed": None})
    assert identity({"seed": 0}) != identity({})


def test_delivery_details_are_no_part_of_the_identity() -> None:
    assert identity({"deadline": "2030-01-01T00:00:00Z", "callbackUrl": "https://x.org"}) == identity({})


@given(st.text())
def test_seeds_are_32_bits_and_repeat(job_id: str) -> None:
    assert seed_of(job_id) == seed_of(job_id)
    assert 0 <= seed_of(job_id) < 2**32


def test_ids_can_be_names_of_files() -> None:
    assert re.fullmatch(r"edit-[0-9a-f]{32}", identity({}))


@pytest.mark.parametrize(
    ("url", "receiver"),
    [
        ("https://a.example/hook?x=1", "a.example"),
        ("https://A.Example.:443/", "a.example"),
        ("http://a.example:80", "a.example"),
        ("https://a.example:80", "a.example:80"),
        ("https://bücher.example/", "xn--bcher-kva.example"),
        ("https://[::1]:8443/", "::1:8443"),
        ("https://a.example:99999/", ""),
        ("https://" + "a" * 64 + ".example/", ""),
        ("", ""),
    ],
)
def test_a_receiver_is_the_same_however_its_host_is_spelt(url: str, receiver: str) -> None:
    assert records.receiver_of(url) == receiver

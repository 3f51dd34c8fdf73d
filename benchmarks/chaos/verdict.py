"""What became of a session, by what is on record of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from serve_app.jobs.record import Job, State

from .sessions import Poison, Session

_LAST_WORDS = ("completed", "failed", "canceled")


class Outcome(StrEnum):
    #: A good session whose job succeeded, whose document says so, and whose picture is its own.
    COMPLETED = "completed"
    #: A poisoned session that failed and is in the dead-letter topic, both for the right reason.
    DEAD_LETTERED = "dead_lettered"
    #: It ended otherwise, or nobody knows of it.
    LOST = "lost"
    #: Another's picture or none, another reason, or done twice.
    WRONG = "wrong"
    STILL_RUNNING = "still_running"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    jobs: Sequence[Job]
    #: Attributes of its dead letters; one message may be there more than once.
    letters: Sequence[Mapping[str, str]]
    #: The session document's status; empty where there is none.
    document: str


def is_over(session: Session, found: Evidence) -> bool:
    """Whether nothing more is to happen to it."""
    if any(not job.status.is_final for job in found.jobs):
        return False
    return bool(found.letters) if session.poison else found.document in _LAST_WORDS


def outcome(session: Session, found: Evidence, *, has_right_picture: bool) -> tuple[Outcome, str]:
    """The outcome, and what is wrong with it in a few words."""
    running = [f"{job.id} is {job.status}" for job in found.jobs if not job.status.is_final]
    if running:
        return Outcome.STILL_RUNNING, "; ".join(running)
    if len(found.jobs) > 1:
        return Outcome.WRONG, f"it became {len(found.jobs)} jobs"
    job = found.jobs[0] if found.jobs else None
    return _poisoned(session.poison, found, job) if session.poison else _good(found, job, has_right_picture)


def _good(found: Evidence, job: Job | None, has_right_picture: bool) -> tuple[Outcome, str]:
    if job is None:
        return Outcome.LOST, "there is no job"
    if job.status != State.SUCCEEDED:
        return Outcome.LOST, f"it is {job.status}: {job.error}"
    if found.document != "completed":
        return Outcome.LOST, f"its document says {found.document or 'nothing'}"
    if not has_right_picture:
        return Outcome.WRONG, "it has not its own picture"
    return Outcome.COMPLETED, ""


def _poisoned(poison: Poison, found: Evidence, job: Job | None) -> tuple[Outcome, str]:
    if not found.letters:
        return Outcome.LOST, f"no dead letter ({poison.name})"
    reasons = {letter.get("deadLetterReason", "none") for letter in found.letters}
    if job is not None:
        reasons.add(job.error.code if job.error else job.status)
    if reasons != {poison.reason}:
        return Outcome.WRONG, f"{poison.name}: it ended with {', '.join(sorted(reasons))}"
    return Outcome.DEAD_LETTERED, ""


def conflicting(results: Mapping[str, Sequence[str]]) -> list[str]:
    """The paths among `results`, by path the hash of every version that was ever stored, whose versions differ."""
    return [path for path, hashes in results.items() if len(set(hashes)) > 1]

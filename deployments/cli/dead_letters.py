"""Dead letters: `fluxfill deadletters list | replay`.

A replayed letter is acknowledged last, after its job was requeued and its message published: a crash in between sends
the message twice, which jobs allow for, and loses nothing. If the job was asked for again meanwhile, the message is a
duplicate; if a user then canceled it, the message is not sent.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from serve_app import adapters
from serve_app.errors import FluxFillError, MalformedMessage, MessageRefused, Unavailable, UnknownJob
from serve_app.jobs import claims, messages
from serve_app.jobs.ports import DeadLetter, DeadLetters, JobStore, Publisher
from serve_app.jobs.record import State
from serve_app.settings import Settings

from .screen import Screen

#: Letters in one pull: few enough to be handled within their lease.
BATCH = 100

deadletters_app = typer.Typer(
    no_args_is_help=True, help="List and replay dead letters, messages that could not be processed."
)
out = Screen()


@dataclass
class Replayed:
    """The outcome of one replay, in letters."""

    sent: int = 0
    #: Not chosen.
    left: int = 0
    #: Not sent, and gone: their jobs were asked for again by another message, and then canceled.
    canceled: int = 0
    #: The reasons of those that cannot be sent.
    refused: list[str] = field(default_factory=list)
    #: What ended it early.
    error: FluxFillError | None = None


class Replay:
    def __init__(self, letters: DeadLetters, job_store: JobStore, publisher: Publisher, *, max_bytes: int) -> None:
        """`max_bytes` is the length of the longest valid message."""
        self._letters = letters
        self._jobs = job_store
        self._publisher = publisher
        self._max_bytes = max_bytes
        #: Job and data: a message that fails again at once returns as a new letter, and must not be sent for ever.
        self._sent: set[tuple[str, bytes]] = set()

    async def run(self, is_chosen: Callable[[DeadLetter], bool]) -> Replayed:
        """Send the chosen letters' messages again, and nack the others."""
        done, kept = Replayed(), list[DeadLetter]()
        try:
            async for letter in each(self._letters):
                kept.append(letter)
                if not is_chosen(letter) or _content(letter) in self._sent:
                    done.left += 1
                elif await self._is_done(letter, done):
                    kept.pop()
        except Unavailable as e:
            done.error = e
        try:
            await self._letters.give_back(kept)
        except Unavailable as e:
            # They are delivered again when their lease ends.
            done.error = done.error or e
        return done

    async def _is_done(self, letter: DeadLetter, done: Replayed) -> bool:
        try:
            is_sent = await self._is_sent(letter)
        except MessageRefused as e:
            done.refused.append(f"message {letter.delivery.message_id}: {e}")
            return False
        await self._letters.acknowledge([letter])
        done.sent += is_sent
        done.canceled += not is_sent
        return True

    async def _is_sent(self, letter: DeadLetter) -> bool:
        """False for a letter whose job a user has canceled since it failed: its message must not run it again."""
        attributes = letter.delivery.attributes
        if attributes.get("deadLetterTruncated"):
            raise MessageRefused("only its beginning was kept")
        self._sent.add(_content(letter))
        if job_id := attributes.get("deadLetterJobId"):
            lock_key = session_of(letter, max_bytes=self._max_bytes)
            # The job may be gone; then its message creates it again.
            with suppress(UnknownJob):
                job = await self._jobs.update(job_id, lock_key, claims.replay)
                if job.status == State.CANCELED:
                    return False
        await self._publisher.publish("sessions", letter.delivery.data, messages.without_reasons(attributes))
        return True


async def each(letters: DeadLetters, limit: int | None = None) -> AsyncIterator[DeadLetter]:
    """Every letter once, leased, until `limit` or until a pull brings no new one."""
    seen: set[str] = set()
    while limit is None or len(seen) < limit:
        pulled = await letters.pull(BATCH if limit is None else min(BATCH, limit - len(seen)))
        # A letter whose lease has ended is delivered again.
        new = [letter for letter in pulled if letter.delivery.message_id not in seen]
        if not new:
            return
        for letter in new:
            seen.add(letter.delivery.message_id)
            yield letter


async def first(letters: DeadLetters, limit: int) -> Sequence[DeadLetter]:
    """Up to `limit` letters, which stay in the subscription."""
    found = [letter async for letter in each(letters, limit)]
    await letters.give_back(found)
    return found


def session_of(letter: DeadLetter, *, max_bytes: int) -> str:
    """USER/SESSION, as in jobs; empty if the message cannot be read."""
    try:
        message, _ = messages.parse_edit(letter.delivery.data, max_bytes=max_bytes)
    except MalformedMessage:
        return ""
    return f"{message.user_id}/{message.session_id}"


def _content(letter: DeadLetter) -> tuple[str, bytes]:
    return letter.delivery.attributes.get("deadLetterJobId", ""), letter.delivery.data


# The command line

CONFIG = Path("serve_config.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The Serve config file of the app.")]


@deadletters_app.command("list")
def list_letters(
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=10_000)] = 20,
    config: ConfigOption = CONFIG,
) -> None:
    """List dead letters and their reasons, leaving them in place."""
    settings = _settings(config)
    table = Table("when", Column("reason, attempts", no_wrap=True), Column("job, session", no_wrap=True), "message")
    for letter in asyncio.run(_listed(settings, limit)):
        why, published = letter.delivery.attributes, letter.delivery.publish_time
        cells = (
            published.astimezone().strftime("%m-%d %H:%M") if published else "",
            f"{why.get('deadLetterReason', '')}\n{why.get('deadLetterAttempts', '')}",
            f"{why.get('deadLetterJobId', '')}\n{session_of(letter, max_bytes=settings.limits.message_bytes)}",
            why.get("deadLetterError", ""),
        )
        table.add_row(*map(Text, cells))
    out.print(table)


@deadletters_app.command("replay")
def replay_letters(
    job: Annotated[str | None, typer.Option(help="Only this job's.")] = None,
    reason: Annotated[str | None, typer.Option(help="Only those with this error code.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    config: ConfigOption = CONFIG,
) -> None:
    """Send messages again, each with all its attempts. A letter is removed once its message is published."""
    if not (job or reason or everything):
        raise typer.BadParameter("say which: --job ID, --reason CODE or --all")
    wanted = {name: value for name, value in (("deadLetterJobId", job), ("deadLetterReason", reason)) if value}

    def is_chosen(letter: DeadLetter) -> bool:
        return wanted.items() <= letter.delivery.attributes.items()

    done = asyncio.run(_replayed(_settings(config), is_chosen))
    counts = f"replayed {done.sent}, left {done.left}, canceled since {done.canceled}"
    out.print(f"{counts}, could not replay {len(done.refused)}", highlight=False)
    for why in done.refused:
        out.print(why, highlight=False, markup=False)
    if done.error:
        raise done.error
    if done.refused:
        raise typer.Exit(1)


async def _listed(settings: Settings, limit: int) -> Sequence[DeadLetter]:
    letters = adapters.dead_letters(settings.messages)
    try:
        return await first(letters, limit)
    finally:
        await letters.close()


async def _replayed(settings: Settings, is_chosen: Callable[[DeadLetter], bool]) -> Replayed:
    letters = adapters.dead_letters(settings.messages)
    job_store, publisher = adapters.job_store(settings.jobs), adapters.publisher(settings.messages)
    try:
        replay = Replay(letters, job_store, publisher, max_bytes=settings.limits.message_bytes)
        return await replay.run(is_chosen)
    finally:
        await letters.close()


def _settings(config: Path) -> Settings:
    from ..app import absolute
    from ..config import load

    return absolute(load(config).settings)

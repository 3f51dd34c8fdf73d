"""The tables of a job database, and how an older version's become the present ones.

A record is kept as JSON beside the columns that queries need. Columns keep their names, because two versions of the
service share a database while one replaces the other.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, get_args

import sqlalchemy as sa

from ...errors import SettingsError
from ...jobs.record import Job, Notification, State
from .records import read_all, read_record

#: Raised with every change to the tables. 2: `jobs.owes_at`, and cancellations. 3: what is owed, apart. 4: owners and
#: variants.
SCHEMA = 4

UNFINISHED = tuple(state for state in State if not state.is_final)
_METADATA = sa.MetaData()
_VERSION = sa.Table("schema_version", _METADATA, sa.Column("version", sa.Integer, primary_key=True))
#: Moments are seconds since 1970: a double holds them to the microsecond.
JOBS = sa.Table(
    "jobs",
    _METADATA,
    sa.Column("id", sa.String(256), primary_key=True),
    sa.Column("type", sa.String(16), nullable=False, index=True),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("session_key", sa.String(512), nullable=False, index=True, key="lock_key"),
    sa.Column("created_at", sa.Double, nullable=False, index=True),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("record", sa.Text, nullable=False),
    #: When the first notification is due, and when each is.
    sa.Column("owes_at", sa.Double),
    *(sa.Column(f"owes_{notification}_at", sa.Double) for notification in get_args(Notification)),
    #: Whom the webhook is owed.
    sa.Column("receiver", sa.Text),
    # An older version, which shares the database meanwhile, writes neither.
    sa.Column("owner", sa.Text, server_default="", nullable=False),
    sa.Column("variant", sa.Text, server_default="", nullable=False),
)
_INDEXES = {
    2: [sa.Index("ix_jobs_owes_at", JOBS.c.owes_at)],
    3: [
        sa.Index("ix_jobs_owes_session_at", JOBS.c.owes_session_at),
        sa.Index("ix_jobs_owes_completion_at", JOBS.c.owes_completion_at),
        sa.Index("ix_jobs_owes_dispatch_at", JOBS.c.owes_dispatch_at),
        sa.Index("ix_jobs_owes_webhook_at", JOBS.c.receiver, JOBS.c.owes_webhook_at),
    ],
    4: [
        sa.Index("ix_jobs_owner_created_at", JOBS.c.owner, JOBS.c.created_at),
        sa.Index("ix_jobs_owner_status", JOBS.c.owner, JOBS.c.status),
        sa.Index("ix_jobs_variant_status_created_at", JOBS.c.variant, JOBS.c.status, JOBS.c.created_at),
    ],
}
PROGRESS = sa.Table(
    "progress",
    _METADATA,
    sa.Column("job_id", sa.String(256), primary_key=True),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("updated_at", sa.DateTime, server_default=sa.func.now(), onupdate=sa.func.now()),
)
CANCELLATIONS = sa.Table(
    "cancellations",
    _METADATA,
    sa.Column("session_key", sa.String(512), primary_key=True, key="lock_key"),
    sa.Column("until", sa.Double, nullable=False),
)
SESSIONS = sa.Table(
    "sessions",
    _METADATA,
    sa.Column("user_id", sa.String(128), primary_key=True),
    sa.Column("session_id", sa.String(128), primary_key=True),
    sa.Column("job_id", sa.String(256), nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)


def are_current(connection: sa.Connection) -> bool:
    if not sa.inspect(connection).has_table(_VERSION.name):
        return False
    return connection.scalar(sa.select(_VERSION.c.version)) == SCHEMA


def bring_up_to_date(connection: sa.Connection) -> None:
    """Make the tables that are absent and change those of an older version. Nobody else may do so meanwhile.

    Raises SettingsError where a newer version of this service wrote the database.
    """
    _METADATA.create_all(connection)
    version = connection.scalar(sa.select(_VERSION.c.version))
    if version is None:
        connection.execute(_VERSION.insert().values(version=SCHEMA))
    elif version > SCHEMA:
        raise SettingsError(
            f"the job store has schema {version}, written by a newer version of this service; this one knows {SCHEMA}",
            schema=version,
        )
    elif version < SCHEMA:
        _add_columns(connection, version)
        connection.execute(_VERSION.update().values(version=SCHEMA))


def seconds(moment: datetime | None) -> float | None:
    """A moment as it is stored."""
    return None if moment is None else moment.timestamp()


def added_columns(job: Job) -> Mapping[str, Any]:
    """What later schemas keep beside the record."""
    due = {notification: owed.due_at for notification, owed in job.owed.items()}
    return {
        "owes_at": seconds(job.owes_at),
        **{f"owes_{notification}_at": seconds(due.get(notification)) for notification in get_args(Notification)},
        "receiver": job.receiver if "webhook" in due else None,
        "owner": job.owner,
        "variant": job.variant,
    }


def _add_columns(connection: sa.Connection, version: int) -> None:
    # Cancellations are there already: a table that is absent is made whatever the version.
    moment, words = "DOUBLE PRECISION", "TEXT NOT NULL DEFAULT ''"
    added = {
        2: {"owes_at": moment},
        3: {**{f"owes_{notification}_at": moment for notification in get_args(Notification)}, "receiver": "TEXT"},
        4: {"owner": words, "variant": words},
    }
    for since in range(version + 1, SCHEMA + 1):
        for name, kind in added[since].items():
            connection.exec_driver_sql(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
        for index in _INDEXES[since]:
            index.create(connection)
    # No older job has an owner, and the variant of one that is over and owes nothing is not looked for.
    wanted = JOBS.c.record.contains('"due_at"') | JOBS.c.status.in_(UNFINISHED)
    rows = connection.execute(sa.select(JOBS.c.id, JOBS.c.record).where(wanted)).all()
    for job in read_all(lambda offset: rows[offset:], lambda row: read_record(row.id, row.record), len(rows)):
        connection.execute(JOBS.update().where(JOBS.c.id == job.id).values(**added_columns(job)))

"""Pooled connections to a server that may fall silent.

A proxy may keep a connection open, acknowledge what is sent and never answer; the driver waits for ever. So the call
that uses a connection knows it, from before the pool tries it out, and shuts it down when its caller stops waiting:
the thread fails, and the pool replaces this connection and all that are older.
"""

import os
import socket
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import InvalidatePoolError

from ..calls import current_call


def watch(engine: sa.Engine) -> None:
    """Try out each connection that is taken from the pool, and let its call interrupt it. For psycopg."""
    driver_error = engine.dialect.loaded_dbapi.Error

    def use(connection: Any) -> None:
        current_call().interrupt_by(lambda: _shut_down(connection, driver_error))

    def on_connect(connection: Any, record: Any) -> None:
        use(connection)
        record.info["is_new"] = True

    def on_checkout(connection: Any, record: Any, _fairy: Any) -> None:
        use(connection)
        if record.info.pop("is_new", False):
            return
        try:
            engine.dialect.do_ping(connection)
        except driver_error as e:
            raise InvalidatePoolError() from e

    def leave(_connection: Any, _record: Any) -> None:
        current_call().interrupt_by(None)

    # First: SQLAlchemy's own listener asks a new connection for the server's version.
    sa.event.listen(engine, "connect", on_connect, insert=True)
    sa.event.listen(engine, "checkout", on_checkout)
    for event in ("checkin", "close"):
        sa.event.listen(engine, event, leave)


def _shut_down(connection: Any, driver_error: type[Exception]) -> None:
    # Closing it is for the thread that uses it. One that was lost a moment ago has no socket any more.
    with suppress(driver_error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)

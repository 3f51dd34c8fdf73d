"""Calls on a store, done in a thread for a caller that may stop waiting."""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from ..errors import StoreUnavailable

T = TypeVar("T")


class Call:
    """One caller's work. The caller, in its own thread, may abandon it at any moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._interrupt: Callable[[], None] | None = None
        self._callers_error: Exception | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Do `work`, for which this is the `current_call`."""
        token = _CURRENT.set(self)
        try:
            return work()
        finally:
            _CURRENT.reset(token)

    def callers(self, work: Callable[[], T]) -> T:
        """Do `work`, a function of the caller's within the store's."""
        try:
            return work()
        except Exception as e:
            self._callers_error = e
            raise

    def is_callers(self, error: Exception) -> bool:
        """Whether the caller's function raised this error, and not the store."""
        return error is self._callers_error

    def interrupt_by(self, interrupt: Callable[[], None] | None) -> None:
        """What ends the work's waiting, from another thread, should it be abandoned; None: nothing from now on."""
        with self._lock:
            self._interrupt = interrupt
            if interrupt and self._is_abandoned:
                interrupt()

    def abandon(self) -> None:
        """Nobody waits any more. Changes nothing where the work is done."""
        with self._lock:
            self._is_abandoned = True
            if self._interrupt:
                self._interrupt()

    def check(self) -> None:
        """Raises StoreUnavailable where the caller no longer waits."""
        if self._is_abandoned:
            raise StoreUnavailable("the caller no longer waits for the store's answer")


_CURRENT: ContextVar[Call] = ContextVar("current_call")


def current_call() -> Call:
    """The call that runs in this thread; one that nobody abandons where there is none."""
    return _CURRENT.get(None) or Call()

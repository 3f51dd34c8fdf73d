"""Exceptions that an SDK raises and does not document: each becomes an error that callers know, and is logged with its
traceback, because it may as well be a fault of the adapter."""

import logging
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)
E = TypeVar("E", bound=Exception)


def unforeseen(kind: Callable[[str], E], what: str, error: Exception) -> E:
    """An error of `kind`, to be raised from `error`. `what` says whose answer it was."""
    sentence = f"{what}: an unexpected response: {type(error).__name__}: {error}"
    log.warning("%s", sentence, exc_info=error, extra={"action": "unexpected_response"})
    return kind(sentence)

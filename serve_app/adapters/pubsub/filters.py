"""Pub/Sub's filters, as far as priorities need them (https://cloud.google.com/pubsub/docs/subscription-message-filter).

A filter is one or more terms, all joined by AND or all by OR (Pub/Sub wants parentheses where they are mixed, which are
not understood here), each of them

    attributes:NAME              attributes.NAME = "VALUE"              attributes.NAME != "VALUE"

with or without NOT before it. A message without the attribute satisfies `!=`.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

#: Pub/Sub's own limit.
MAX_BYTES = 256
_TERM = r'(?:NOT\s+|-)?attributes(?::[\w-]+|\.[\w-]+\s*!?=\s*"[^"\\]*")'
_WHOLE = re.compile(rf"\s*(?:{_TERM}(?:\s+AND\s+{_TERM})*|{_TERM}(?:\s+OR\s+{_TERM})*)?\s*")
_PARTS = re.compile(
    r"(?:(?P<join>AND|OR)\s+)?(?P<not>NOT\s+|-)?attributes"
    r'(?::(?P<has>[\w-]+)|\.(?P<name>[\w-]+)\s*(?P<operator>!?=)\s*"(?P<value>[^"\\]*)")'
)


class Filter:
    """Raises ValueError for what is not understood. An empty one matches every message."""

    def __init__(self, text: str) -> None:
        if len(text.encode()) > MAX_BYTES:
            raise ValueError(f"a filter of {len(text.encode())} bytes; {MAX_BYTES} are allowed")
        if not _WHOLE.fullmatch(text):
            raise ValueError(
                f'filter {text!r}: supported are attributes:NAME, attributes.NAME = "VALUE" and '
                'attributes.NAME != "VALUE", with or without NOT, all joined by AND or all by OR'
            )
        self._terms = tuple(_PARTS.finditer(text))
        self._is_any = any(term["join"] == "OR" for term in self._terms)

    def matches(self, attributes: Mapping[str, str]) -> bool:
        each = (_holds(term, attributes) for term in self._terms)
        return any(each) if self._is_any else all(each)


@lru_cache(maxsize=256)
def parsed(text: str) -> Filter:
    """Raises ValueError for what is not understood."""
    return Filter(text)


def _holds(term: re.Match[str], attributes: Mapping[str, str]) -> bool:
    if term["has"]:
        holds = term["has"] in attributes
    else:
        holds = (attributes.get(term["name"]) == term["value"]) == (term["operator"] == "=")
    return holds is not bool(term["not"])

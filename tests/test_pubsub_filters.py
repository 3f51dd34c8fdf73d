"""Pub/Sub's filters. The rows agree with pstest, the fake of Google's own Go client."""

import pytest

from serve_app.adapters.pubsub.filters import Filter

HIGH, LOW, NONE = {"priority": "high"}, {"priority": "low", "x-y": ""}, {"other": "high"}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", [HIGH, LOW, NONE]),
        ("attributes:priority", [HIGH, LOW]),
        ("NOT attributes:priority", [NONE]),
        ("-attributes:priority", [NONE]),
        ('attributes.priority = "high"', [HIGH]),
        ('attributes.priority="high"', [HIGH]),
        ('attributes.priority != "high"', [LOW, NONE]),
        ('NOT attributes.priority != "high"', [HIGH]),
        ("attributes:x-y", [LOW]),
        ('attributes.x-y = ""', [LOW]),
        ('attributes:priority AND attributes.priority != "high"', [LOW]),
        ('attributes.priority = "high" OR NOT attributes:priority', [HIGH, NONE]),
        ('attributes.priority = "high" OR attributes.priority = "low" OR attributes:other', [HIGH, LOW, NONE]),
        ('attributes.priority = "a OR attributes:priority"', []),
    ],
)
def test_what_a_filter_lets_through(text: str, matches: list[dict[str, str]]) -> None:
    assert [attributes for attributes in (HIGH, LOW, NONE) if Filter(text).matches(attributes)] == matches


@pytest.mark.parametrize(
    "text",
    [
        "priority",
        "attributes.priority",
        "attributes.priority = high",
        "attributes.priority = 'high'",
        'attributes.priority = "hi\\"gh"',
        'attributes.priority == "high"',
        'attributes.priority = "high" and attributes:x',
        "attributes:a AND attributes:b OR attributes:c",
        "(attributes:a)",
        "attributes:a AND",
        "NOT NOT attributes:a",
        'hasPrefix(attributes.a, "x")',
    ],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"supported are attributes:NAME"):
        Filter(text)


def test_a_long_filter_is_refused() -> None:
    Filter(f'attributes.a = "{"x" * 239}"')
    with pytest.raises(ValueError, match="257 bytes; 256 are allowed"):
        Filter(f'attributes.a = "{"x" * 240}"')

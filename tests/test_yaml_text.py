"""One value set in a YAML text: everything else keeps its every character, or it is refused."""

import pytest
import yaml

from deployments.yaml_text import Keys, put


@pytest.mark.parametrize(
    ("text", "keys", "value", "edited"),
    [
        ("a: 1 # one\nb: 2\n", ("a",), 3, "a: 3 # one\nb: 2\n"),
        ("a: 'x'\n", ("a",), "y", "a: y\n"),
        ("a: x\n", ("a",), "1.5", "a: '1.5'\n"),
        ("a: x\n", ("a",), "null", "a: 'null'\n"),
        ("a:\nb: 2\n", ("a",), 3, "a: 3\nb: 2\n"),
        ("a: ~ # none\n", ("a", "b"), 3, "a: {b: 3} # none\n"),
        ("a: {b: 1}\n", ("a", "c"), 2, "a: {b: 1, c: 2}\n"),
        ("a: {b: 1,}\n", ("a", "c"), 2, "a: {b: 1,c: 2}\n"),
        ("a: { }\n", ("a", "c"), [1], "a: {c: [1] }\n"),
        ("a: []\n", ("a", 0, "c"), 2, "a: [{c: 2}]\n"),
        ("a: [1]", ("a", 1), 2, "a: [1, 2]"),
        ("a:\n  b: 1\n\n  # of c\nc: 2\n", ("a", "d"), 3, "a:\n  b: 1\n  d: 3\n\n  # of c\nc: 2\n"),
        ("a:\n  b: 1", ("a", "d"), {"e": 3}, "a:\n  b: 1\n  d:\n    e: 3"),
        ("a:\n  b: >\n    x\n    y\nc: 2\n", ("a", "d"), 3, "a:\n  b: >\n    x\n    y\n  d: 3\nc: 2\n"),
        ("a:\n- b: {c: 1} # b\nd: 2\n", ("a", 1), {"e": 3}, "a:\n- b: {c: 1} # b\n- e: 3\nd: 2\n"),
        ("a:\r\n  b: 1\r\nc: 2\r\n", ("a", "d"), 3, "a:\r\n  b: 1\r\n  d: 3\r\nc: 2\r\n"),
        ("\ufeffa: 1\n", ("a",), 2, "\ufeffa: 2\n"),
        ("u: &u {b: 1}\na:\n  <<: *u\n  c: 1\n", ("a", "b"), 2, "u: &u {b: 1}\na:\n  <<: *u\n  c: 1\n  b: 2\n"),
    ],
)
def test_a_value_is_set_and_nothing_else(text: str, keys: Keys, value: object, edited: str) -> None:
    assert put(text, keys, value) == edited
    assert put(edited, keys, value) == edited
    assert yaml.safe_load(edited) is not None


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("x: &x 1\na: *x\n", ("a",)),
        ("a: &x 1\nb: *x\n", ("a",)),
        ("x: &x {b: 1}\na: *x\n", ("a", "b")),
        ("a: {b: 1, # one\n}\n", ("a", "c")),
        ("a: |+\n  x\n\n", ("c",)),
        ("a: [1\n", ("a",)),
        ("a: [1]\n", ("a",)),
        ("a:\n  b: 1\n", ("a",)),
        ("- a\n", ("a",)),
        ("a: 1\n", ("a", "b")),
        ("", ("a",)),
    ],
)
def test_what_would_change_something_else_is_refused(text: str, keys: Keys) -> None:
    with pytest.raises(ValueError):
        put(text, keys, 2)

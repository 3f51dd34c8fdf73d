"""Setting a value in a YAML text while every other character stays as it is: comments, order, quotes, indentation.

A library that writes the whole document anew keeps comments, but lays lists, long lines and blanks out its own way.
Here one place is edited, by the marks that the parser leaves; the outcome is parsed and compared: right, or refused.
"""

import re
from collections.abc import Mapping
from textwrap import indent
from typing import Any

import yaml

#: Keys and list positions from the top.
Keys = tuple[str | int, ...]

_LINE_END = re.compile(r"\r?\n|\Z")


def put(text: str, keys: Keys, value: Any) -> str:
    """The text with `value` at `keys`; what is missing on the way there is added, a list's next item among it.

    Raises ValueError where that cannot be done in one place: behind an alias, for a whole list or mapping that is there
    already, or where the text is not YAML.
    """
    try:
        data = yaml.safe_load(text)
        if (wanted := _with(data, keys, value)) == data:
            return text
        node, missing = _deepest(yaml.compose(text, Loader=yaml.SafeLoader), keys)
        edited = _edited(text, node, missing, value)
        if yaml.safe_load(edited) == wanted:
            return edited
    except yaml.YAMLError as e:
        raise ValueError(f"{_path(keys)} cannot be set here: {getattr(e, 'problem', e)}") from e
    raise ValueError(f"{_path(keys)} cannot be set here without changing something else")


def _path(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _with(tree: Any, keys: Keys, value: Any) -> Any:
    """The data as it should be; what aliases share is shared no more on the way."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(key, int) and isinstance(tree, list | None):
        items = [*(tree or ()), None][: max(key + 1, len(tree or ()))]
        return [_with(item, rest, value) if i == key else item for i, item in enumerate(items)]
    if isinstance(key, str) and isinstance(tree, dict | None):
        return {**(tree or {}), key: _with((tree or {}).get(key), rest, value)}
    raise ValueError(f"{key} cannot be part of {type(tree).__name__} {tree!r:.40}")


def _deepest(node: yaml.Node | None, keys: Keys) -> tuple[yaml.Node, Keys]:
    """The last node that is there, and the keys that are missing below it."""
    if node is None:
        raise ValueError("the text is empty")
    while keys and (below := _below(node, keys[0])) is not None:
        node, keys = below, keys[1:]
    return node, keys


def _below(node: yaml.Node, key: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for name, value in node.value if name.value == key), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        found: yaml.Node = node.value[key]
        return found
    return None


def _edited(text: str, node: yaml.Node, missing: Keys, value: Any) -> str:
    start, end = node.start_mark.index, node.end_mark.index
    for key in reversed(missing):
        value = [value] if isinstance(key, int) else {key: value}
    if isinstance(node, yaml.ScalarNode):
        # Nothing at all is null, too: `key:`.
        new = _flow(value) if end > start else f" {_flow(value)}"
    elif not missing or not isinstance(node, yaml.CollectionNode):
        raise ValueError("a list or a mapping stands there")
    elif node.flow_style:
        start = end = len(text[: end - 1].rstrip())
        new = (", " if node.value and text[end - 1] != "," else "") + _flow(value)[1:-1]
    else:
        start = end = _line_end(text, node)
        new = "\n" + indent(_block(value), " " * node.start_mark.column).rstrip("\n")
    return text[:start] + (new.replace("\n", "\r\n") if "\r\n" in text else new) + text[end:]


def _line_end(text: str, node: yaml.Node) -> int:
    """Of the last line of a collection in block style. Its own end mark lies behind the comments that follow it."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    found = _LINE_END.search(text, len(text[: node.end_mark.index].rstrip()))
    assert found is not None, "every text ends"
    return found.start()


def _flow(value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return dumped.removesuffix("...\n").rstrip("\n")


def _block(value: Mapping[str, Any] | list[Any]) -> str:
    return yaml.safe_dump(value, default_flow_style=False, sort_keys=False)

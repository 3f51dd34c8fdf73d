"""What may be the path of a blob. The same rule for every store."""

import unicodedata

from ...errors import UnsafePath

#: Bytes of a path: Google Cloud Storage's and S3's limit.
MAX_PATH = 1024
#: Control characters, and surrogates, which have no UTF-8 form.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs"})


def check_path(path: str) -> str:
    """`path`, where it is a relative path of plain parts. Raises UnsafePath, which says what is wrong with it."""
    problem = _problem(path)
    if problem:
        raise UnsafePath(f"blob path {path[:80]!r} {problem}", path=path[:MAX_PATH])
    return path


def _problem(path: str) -> str:
    if not path:
        return "is empty"
    size = len(path.encode(errors="surrogatepass"))
    if size > MAX_PATH:
        return f"has {size} bytes; {MAX_PATH} are allowed"
    if path.startswith("/"):
        return "is absolute"
    if "\\" in path:
        return "has a backslash"
    if any(unicodedata.category(c) in _REFUSED_CATEGORIES for c in path):
        return "has a control character"
    wrong = [part for part in path.split("/") if part in ("", ".", "..")]
    return f"has a part {wrong[0]!r}" if wrong else ""

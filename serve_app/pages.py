"""What a web page may ask of an app that asks nobody for a key: nothing that changes anything, and nothing under a name
that is not the app's.

On a machine of one's own any page in its browser reaches loopback. A page of another site is told apart by what its
browser says and the page cannot change: `Host`, which names the page's own site where a name was made to point here
(DNS rebinding), `Origin` and `Sec-Fetch-Site`. The type `application/json` is one that a page sends to another site
only after it asked (CORS), which is never allowed.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from .errors import ForeignHost, ForeignOrigin, UnsupportedMediaType
from .urls import is_loopback

_CHANGES_NOTHING = ("GET", "HEAD", "OPTIONS")
#: A name or an address, and the port behind it.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(:[0-9]+)?")


_JSON = "application/json"


def check_page(method: str, headers: Mapping[str, str]) -> None:
    """`headers` by their names in lower case. Raises ForeignHost, ForeignOrigin, UnsupportedMediaType."""
    host = headers.get("host", "").lower()
    if not _is_loopback(host):
        raise ForeignHost("this app answers to localhost and loopback addresses only; see docs/security.md")
    if method in _CHANGES_NOTHING:
        return
    if "origin" in headers and _authority(headers["origin"]) != host:
        raise ForeignOrigin("the request comes from a web page of another site")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ForeignOrigin("the request comes from a web page of another site")
    if _has_body(headers) and headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise UnsupportedMediaType(f"a body must be {_JSON}")


def _is_loopback(host: str) -> bool:
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1])


def _authority(url: str) -> str:
    """Host and port, as a `Host` header writes them; empty where there is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _has_body(headers: Mapping[str, str]) -> bool:
    length = headers.get("content-length", "0")
    return length != "0" or "transfer-encoding" in headers or "content-type" in headers

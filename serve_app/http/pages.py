"""Refuses requests of web pages to an app without keys: those that change something, and those to a host name that is
not the app's.

Any page in a browser on the app's machine can reach loopback. A page of another site is recognised by headers that its
browser sets and the page cannot change: `Host`, which has the page's own site after DNS rebinding, `Origin` and
`Sec-Fetch-Site`. A page may send `application/json` to another site only after a preflight (CORS), which is never
allowed. A form it may send; jobs with uploads are forms, and only the first three headers tell whose.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from ..errors import ForeignHost, ForeignOrigin, UnsupportedMediaType
from ..urls import is_loopback
from .forms import FORM, JSON

_CHANGES_NOTHING = ("GET", "HEAD", "OPTIONS")
#: A name or an address, and its port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(:[0-9]+)?")
#: Routes that take forms, behind whatever the app is mounted at.
_FORMS = re.compile(r".*/v1/(jobs(/[^/]+)?|files|photos|images/edits)")
_UPLOADS = re.compile(r".*/blobs/[^/]+")


def check_page(method: str, path: str, headers: Mapping[str, str]) -> None:
    """`headers` have lower-case names. Raises ForeignHost, ForeignOrigin, UnsupportedMediaType."""
    host = headers.get("host", "").lower()
    if not _is_loopback(host):
        raise ForeignHost("this app answers to localhost and loopback addresses only; see docs/security.md")
    if method in _CHANGES_NOTHING:
        return
    if "origin" in headers and _authority(headers["origin"]) != host:
        raise ForeignOrigin("the request comes from a web page of another site")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ForeignOrigin("the request comes from a web page of another site")
    # A page may PUT nothing to another site without a preflight, either.
    if method == "PUT" and _UPLOADS.fullmatch(path):
        return
    allowed = (JSON, FORM) if _FORMS.fullmatch(path) else (JSON,)
    if _has_body(headers) and headers.get("content-type", "").partition(";")[0].strip().lower() not in allowed:
        raise UnsupportedMediaType(f"a body must be {' or '.join(allowed)}")


def _is_loopback(host: str) -> bool:
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1])


def _authority(url: str) -> str:
    """Host and port, as in a `Host` header; empty if there is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _has_body(headers: Mapping[str, str]) -> bool:
    length = headers.get("content-length", "0")
    return length != "0" or "transfer-encoding" in headers or "content-type" in headers

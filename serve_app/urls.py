"""What settings ask of URLs: where they listen, what secrets stand in them, which of two stores holds the other."""

import re
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

#: Parameters that are secrets, of libpq and of whatever else is spelt like them.
_SECRET = re.compile(r"password|passwd|passphrase|secret|token", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`. Of names that is known of `localhost` alone."""
    try:
        return ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_of(url: str) -> str:
    """Empty where the URL names none. Raises ValueError for what is no URL."""
    return urlsplit(url).hostname or ""


def has_password(url: str) -> bool:
    """Whether one stands before the host, in a parameter, or in a URL that is a parameter's value. Raises ValueError
    for what is no URL."""
    parts = urlsplit(url)
    parameters = parse_qsl(f"{parts.query}&{parts.fragment}".replace(";", "&"))
    # A database's user is no secret; where others have one, a key or a token is written there.
    is_key = bool(parts.username) and not parts.scheme.startswith("postgresql")
    secrets = (_SECRET.search(name) or has_password(value) for name, value in parameters)
    return bool(parts.password) or is_key or any(secrets)


def overlap(one: str, other: str) -> bool:
    """Whether one of two blob store URLs is the other, or lies within it."""
    first, second = _folders(one), _folders(other)
    return bool(first and second) and all(a == b for a, b in zip(first, second, strict=False))


def _folders(url: str) -> list[str]:
    """Each with what it lies in before it, behind the scheme; none where the URL names no place."""
    scheme, _, rest = url.partition(":")
    if scheme == "files" and rest:
        return [scheme, *Path(rest).resolve().parts]
    parts = urlsplit(url)
    folders = [part for part in f"{parts.netloc}/{parts.path}".split("/") if part]
    return [scheme, *folders] if folders else []

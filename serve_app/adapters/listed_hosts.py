"""URLs that strangers give, and the hosts that the settings allow: the same rules for webhooks and for links."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import httpx

from ..errors import FluxFillError, InputError, SettingsError

#: Characters of a URL that everything between here and the receiver takes (RFC 9110 asks for 8,000 and up).
MAX_URL = 2048


class ListedHosts:
    """A host is listed by its name, which stands for its scheme's own port; another port is listed with it, as
    `host:port`. Where the name leads to is its owner's business: over https another's server has no certificate for it.
    """

    def __init__(self, hosts: Sequence[str], *, setting: str, allow_http: bool, refused: type[InputError]) -> None:
        """`setting` is where they are listed. Raises SettingsError for a host that is none."""
        self._hosts = {_listed(host, setting) for host in hosts}
        self._setting, self._refused = setting, refused
        self._schemes = ("https", "http") if allow_http else ("https",)
        # Below httpx's client, which would take proxies from the environment, keep cookies and log whole URLs.
        self._transport = httpx.AsyncHTTPTransport()

    def url(self, text: str, field: str) -> httpx.URL:
        """What `text`, the value of `field`, is taken for, here and on the wire. Raises `refused` for a URL that may
        not be called, and says why without what may be a password."""
        if len(text) > MAX_URL:
            raise self._refused(f"{field}: {len(text)} characters; at most {MAX_URL} are allowed")
        try:
            url = _canonical(text)
        except httpx.InvalidURL:
            # Without the reason, which may quote a password.
            raise self._refused(f"{field}: not a URL") from None
        if url.userinfo:
            raise self._refused(f"{field}: it must not contain a user name or a password")
        if url.scheme not in self._schemes:
            raise self._refused(f"{field}: its scheme is {url.scheme!r}, not https", scheme=url.scheme)
        if (host := authority(url)) not in self._hosts:
            raise self._refused(f"{field}: {host!r} is not listed in {self._setting}", host=host)
        return url

    @asynccontextmanager
    async def answer(
        self, request: httpx.Request, *, within_s: float, failed: Callable[[str], FluxFillError]
    ) -> AsyncIterator[httpx.Response]:
        """The answer, whose body is not read yet. Raises what `failed` makes of the reason where it does not come, or
        is not done with, within `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                response = await self._transport.handle_async_request(request)
                try:
                    yield response
                finally:
                    await response.aclose()
        except FluxFillError:
            raise
        except TimeoutError:
            raise failed(f"did not answer within {within_s:g} s") from None
        except httpx.ConnectError as e:
            raise failed(f"cannot be reached: {e}") from e
        except Exception as e:
            # httpx documents HTTPError; a name's look-up has others. Only the kind: the text may quote the answer.
            raise failed(f"did not answer: {type(e).__name__}") from None

    async def close(self) -> None:
        await self._transport.aclose()


def authority(url: httpx.URL) -> str:
    """Host, and port where it is not the scheme's own."""
    return url.netloc.decode("ascii")


def _canonical(text: str) -> httpx.URL:
    """With its host in ASCII, in lower case and without a trailing dot. Raises httpx.InvalidURL."""
    url = httpx.URL(text)
    try:
        # httpx decodes it when it is read.
        _ = url.host
    except UnicodeError as e:
        raise httpx.InvalidURL("the host is no name in punycode") from e
    return url.copy_with(host=url.raw_host.decode("ascii").removesuffix("."))


def _listed(entry: str, setting: str) -> str:
    try:
        if re.fullmatch(r"[^\s/?#@*\\]+", entry):
            return authority(_canonical(f"https://{entry}"))
    except httpx.InvalidURL:
        pass
    raise SettingsError(f"{setting}: {entry!r} is neither a host name nor host:port", host=entry)

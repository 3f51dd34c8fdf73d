"""Images that requests link to, fetched from listed hosts: one GET each, which follows no redirect."""

import asyncio

import httpx

from ..errors import LinkRefused
from ..settings import Settings
from .listed_hosts import ListedHosts, authority

_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "flux-fill-serve"}


class ImageLinks:
    def __init__(self, settings: Settings, *, timeout_s: float = 20.0) -> None:
        """An image that is not here within `timeout_s` is given up. Raises SettingsError for a host that is none."""
        allow_http = settings.webhooks.allow_http
        self._hosts = ListedHosts(
            settings.api.link_hosts, setting="api.link_hosts", allow_http=allow_http, refused=LinkRefused
        )
        self._timeout_s = timeout_s
        # Below httpx's client, which would take proxies from the environment, keep cookies and log whole URLs.
        self._transport = httpx.AsyncHTTPTransport()

    async def fetch(self, link: str, *, field: str, max_bytes: int) -> bytes:
        """See `serve_app.edit.posted.Links`."""
        url = self._hosts.url(link, field)
        host = authority(url)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._get(httpx.Request("GET", url, headers=_HEADERS), host, field, max_bytes)
        except LinkRefused:
            raise
        except TimeoutError:
            raise LinkRefused(f"{field}: {host} did not send it within {self._timeout_s:g} s", host=host) from None
        except Exception as e:
            # httpx documents HTTPError; a name's look-up has others. Only the kind: the text may quote the answer.
            raise LinkRefused(f"{field}: {host} did not answer: {type(e).__name__}", host=host) from None

    async def _get(self, request: httpx.Request, host: str, field: str, max_bytes: int) -> bytes:
        response = await self._transport.handle_async_request(request)
        try:
            if response.status_code != 200:
                raise LinkRefused(f"{field}: {host} answered {response.status_code}", host=host)
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise LinkRefused(f"{field}: {host} sent more than {max_bytes} bytes", host=host)
            return bytes(body)
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._transport.aclose()

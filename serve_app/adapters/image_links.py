"""Images that requests link to, fetched from listed hosts: one GET each, which follows no redirect."""

import httpx

from ..errors import LinkRefused
from ..settings import Settings
from .listed_hosts import ListedHosts, authority

_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "flux-fill-serve"}


class ImageLinks:
    def __init__(self, settings: Settings, *, timeout_s: float = 20.0) -> None:
        """An image that is not here within `timeout_s` is given up. Raises SettingsError for a host that is none."""
        hosts, allow_http = settings.api.link_hosts, settings.webhooks.allow_http
        self._hosts = ListedHosts(hosts, setting="api.link_hosts", allow_http=allow_http, refused=LinkRefused)
        self._timeout_s, self.close = timeout_s, self._hosts.close

    async def fetch(self, link: str, *, field: str, max_bytes: int) -> bytes:
        """See `serve_app.edit.posted.Links`."""
        url = self._hosts.url(link, field)

        def refused(why: str) -> LinkRefused:
            return LinkRefused(f"{field}: {authority(url)} {why}", host=authority(url))

        request, body = httpx.Request("GET", url, headers=_HEADERS), bytearray()
        async with self._hosts.answer(request, within_s=self._timeout_s, failed=refused) as response:
            if response.status_code != 200:
                raise refused(f"answered {response.status_code}")
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise refused(f"sent more than {max_bytes} bytes")
        return bytes(body)

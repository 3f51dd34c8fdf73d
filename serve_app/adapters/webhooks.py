"""Calls to a publisher's URL, by https://www.standardwebhooks.com/: one signed try each. Trying again is not here."""

import base64
import binascii
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx
from pydantic import SecretStr
from standardwebhooks import Webhook

from ..errors import CallbackRefused, InvalidCredentials, WebhookFailed
from ..jobs.record import Job
from ..settings import Secrets, WebhookSettings
from .listed_hosts import ListedHosts, authority

log = logging.getLogger(__name__)

#: Bytes of a key, by the Standard Webhooks specification.
KEY_BYTES = range(24, 65)


class Webhooks:
    def __init__(self, settings: WebhookSettings, secrets: Secrets) -> None:
        """Raises InvalidCredentials for a malformed WEBHOOK_SECRET; SettingsError for a host that is none."""
        self._settings = settings
        self._hosts = ListedHosts(
            settings.hosts, setting="webhooks.hosts", allow_http=settings.allow_http, refused=CallbackRefused
        )
        self._keys = _keys(secrets.webhook_secret)
        self.close = self._hosts.close

    def check(self, url: str) -> None:
        """Raises CallbackRefused for a URL that may not be called, and says why."""
        self._allowed(url)

    async def call(self, job: Job, event: str, document: Mapping[str, Any]) -> None:
        """Send `document`, which says what became of `job`, to `job.callback_url` as an event of the type `event`. 410
        Gone counts as told.

        The event's id, of job and fence, is the same in every try; its timestamp is this try's.

        Raises CallbackRefused as `check` does; WebhookFailed, with the answer's `status` where there is one, for any
        other answer than 2xx, a redirect included, and for none within the settings' `timeout_s`.
        """
        url = self._allowed(job.callback_url)
        host = authority(url)
        log_context = {"host": host, **job.log_context()}

        def failed(why: str, **status: int) -> WebhookFailed:
            return WebhookFailed(f"{host} {why}", host=host, **status)

        request = self._request(url, job, _event(job, event, document))
        # The body is not read: the connection is closed on it.
        async with self._hosts.answer(request, within_s=self._settings.timeout_s, failed=failed) as response:
            status = response.status_code
        if status == 410:
            extra = {"action": "webhook_gone", **log_context}
            log.info("%s answered 410: not called again for this job", host, extra=extra)
        elif 200 <= status < 300:
            log.info("Delivered a webhook to %s", host, extra={"action": "webhook_delivered", **log_context})
        else:
            raise failed(f"answered {status}", status=status)

    def _allowed(self, text: str) -> httpx.URL:
        if not self._keys:
            raise CallbackRefused("callbackUrl: no URL is called while WEBHOOK_SECRET is not set")
        return self._hosts.url(text, "callbackUrl")

    def _request(self, url: httpx.URL, job: Job, event: Mapping[str, Any]) -> httpx.Request:
        event_id, now, body = f"{job.id}-{job.fence}", datetime.now(UTC), json.dumps(event)
        headers = {
            "content-type": "application/json",
            "user-agent": "flux-fill-serve",
            "webhook-id": event_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(key.sign(event_id, now, body) for key in self._keys),
        }
        if job.traceparent:
            headers["traceparent"] = job.traceparent
        return httpx.Request("POST", url, headers=headers, content=body)


def _event(job: Job, event: str, document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": event,
        "timestamp": job.finished_at.isoformat() if job.finished_at else None,
        "data": {"userId": job.user_id, "sessionId": job.session_id, **document},
    }


def _keys(secret: SecretStr | None) -> list[Webhook]:
    texts = secret.get_secret_value().split() if secret else []
    return [Webhook(_key(text, number)) for number, text in enumerate(texts, 1)]


def _key(text: str, number: int) -> bytes:
    encoded = text.removeprefix("whsec_")
    try:
        # Strictly: Webhook itself would leave out what is not base64, and sign with the rest.
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if encoded == text or len(key) not in KEY_BYTES:
        raise InvalidCredentials(
            f"WEBHOOK_SECRET: secret {number} is not whsec_ and {KEY_BYTES[0]} to {KEY_BYTES[-1]} bytes in base64"
        )
    return key

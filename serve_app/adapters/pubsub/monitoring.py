"""The backlog of Google's Pub/Sub, by Cloud Monitoring: sampled each minute, visible two to four minutes later.

Source: https://cloud.google.com/monitoring/api/ref_v3/rest/v3/projects.timeSeries/list and
https://cloud.google.com/pubsub/docs/monitoring.
"""

import asyncio
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import AuthorizedSession
from requests import RequestException, Session

from ...errors import BrokerUnavailable, SettingsError
from ...jobs.backlog import READ_S, Reading
from ...settings import MessagesSettings
from .client import credentials

API = "https://monitoring.googleapis.com/v3"
#: Points are looked for in so much time before now.
WINDOW = timedelta(minutes=10)
_SCOPES = ("https://www.googleapis.com/auth/monitoring.read",)
#: Of the call, and of reading an answer that has another form.
_FAILURES = (SettingsError, GoogleAuthError, RequestException, ValueError, LookupError, TypeError, AttributeError)
_METRICS = "pubsub.googleapis.com/subscription"


class MonitoredBacklog:
    """Needs the role Monitoring Viewer. MONITORING_EMULATOR_HOST names a stand-in, which needs no credentials."""

    def __init__(self, settings: MessagesSettings) -> None:
        self._settings, self._names = settings, tuple(settings.subscriptions)
        emulator = os.environ.get("MONITORING_EMULATOR_HOST")
        self._url = f"http://{emulator}/v3" if emulator else API
        self._session = Session() if emulator else None

    async def read(self) -> Reading:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Reading:
        try:
            counts, ages = self._newest("num_undelivered_messages"), self._newest("oldest_unacked_message_age")
        except _FAILURES as e:
            raise BrokerUnavailable(f"Cloud Monitoring: {type(e).__name__}: {e}") from e
        missing = [name for name in self._names if name not in counts or name not in ages]
        if missing:
            raise BrokerUnavailable(f"Cloud Monitoring has no recent points of {', '.join(missing)}")
        return Reading(
            messages=sum(value for value, _ in counts.values()),
            oldest_age_s=max(value for value, _ in ages.values()),
            taken_at=min(at for _, at in counts.values()),
        )

    def _newest(self, metric: str) -> Mapping[str, tuple[float, float]]:
        """The newest value of each subscription, and when it was taken."""
        if self._session is None:
            self._session = AuthorizedSession(credentials(self._settings, _SCOPES))
        now = datetime.now(UTC)
        ids = ", ".join(f'"{name}"' for name in self._names)
        query = {
            "filter": f'metric.type = "{_METRICS}/{metric}" AND resource.labels.subscription_id = one_of({ids})',
            "interval.startTime": (now - WINDOW).isoformat(),
            "interval.endTime": now.isoformat(),
        }
        answer = self._session.get(
            f"{self._url}/projects/{self._settings.project}/timeSeries", params=query, timeout=READ_S / 2
        )
        answer.raise_for_status()
        found = {}
        for series in answer.json().get("timeSeries", ()):
            # The newest comes first.
            point = series["points"][0]
            taken_at = datetime.fromisoformat(point["interval"]["endTime"]).timestamp()
            # An int64 is a string in JSON.
            value = float(point["value"].get("int64Value", point["value"].get("doubleValue")))
            found[series["resource"]["labels"]["subscription_id"]] = value, taken_at
        return found

"""A running app's job API, as the command line asks it."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.text import Text
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_delay

from serve_app.adapters.loopback import bypass_proxies

from .screen import Screen

err = Screen(stderr=True)

#: How long an app may be away, in seconds: as long as one takes to be replaced.
OUTAGE_S = 120.0
#: Between two tries, in seconds, where the app does not say.
RETRY_S = 1.0
#: How long the first answer may take, in seconds.
REACH_S = 10.0
#: An event stream that is silent for longer is cut.
SILENCE_S = 60.0


class Refused(Exception):
    """The app answered with a problem (RFC 9457)."""

    def __init__(self, answer: httpx.Response) -> None:
        try:
            problem = json.loads(answer.read())
        except ValueError:
            problem = {}
        self.code = str(problem.get("code", answer.status_code))
        self.detail = str(problem.get("detail", answer.reason_phrase))
        self.passes = answer.status_code in (429, 502, 503, 504) or self.code == "post_in_flight"
        self.retry_after_s = float(answer.headers.get("Retry-After", RETRY_S))


def _passes(error: BaseException) -> bool:
    return bool(getattr(error, "passes", isinstance(error, httpx.TransportError)))


def _pause_s(state: RetryCallState) -> float:
    return float(getattr(state.outcome and state.outcome.exception(), "retry_after_s", RETRY_S))


_insisting = retry(stop=stop_after_delay(OUTAGE_S), wait=_pause_s, retry=retry_if_exception(_passes), reraise=True)


class Server:
    """The job API of a running app, which is asked again for OUTAGE_S where it is away or too busy. Its methods raise
    Refused, and httpx.TransportError."""

    def __init__(self, url: str, key: str | None) -> None:
        bypass_proxies()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=SILENCE_S)
        self._links = httpx.Client(timeout=SILENCE_S, follow_redirects=True)
        self._last_id = ""

    def check_answers(self) -> None:
        """At once: an app that has not been there yet is not started, or elsewhere."""
        self._http.get("/healthz", timeout=REACH_S)

    @_insisting
    def ask(self, method: str, url: str, **request: Any) -> httpx.Response:
        # The key is none of the business of those whom the app links to.
        answer = (self._links if url.startswith("http") else self._http).request(method, url, **request)
        if answer.is_error:
            raise Refused(answer)
        return answer

    @_insisting
    def send(self, upload: Mapping[str, Any], content: Callable[[], Iterator[bytes]]) -> None:
        """A file to where the app said that it is to go."""
        answer = self._links.request(
            upload["method"], upload["url"], headers=upload["headers"], content=content(), timeout=SILENCE_S
        )
        if answer.is_error:
            raise Refused(answer)

    @_insisting
    def follow(self, url: str, told: Callable[[str, Mapping[str, Any]], None]) -> None:
        """One event stream to its end; the next call goes on behind it. `told` takes an event's name and its data."""
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        with self._http.stream("GET", url, headers=headers) as answer:
            if answer.is_error:
                raise Refused(answer)
            fields: dict[str, str] = {}
            # One that is cut has ended, too.
            with suppress(httpx.TransportError):
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if line:
                        # Several lines of data would be joined; the app writes JSON in one.
                        fields[name] = value
                        continue
                    if "data" in fields:
                        self._last_id = fields.get("id", self._last_id)
                        told(fields["event"], json.loads(fields["data"]))
                    fields = {}


#: Options of commands that ask an app.
Url = Annotated[str, typer.Option(help="Where the app is.")]
Key = Annotated[str | None, typer.Option(envvar="FLUXFILL_API_KEY", help="API key with submit and read.")]
HERE = "http://127.0.0.1:8000"


@contextmanager
def failures_told(url: str) -> Iterator[None]:
    """Ends the command where the app refuses, or does not answer."""
    try:
        yield
    except Refused as e:
        fail(e.code, e.detail)
    except httpx.TransportError as e:
        fail("unavailable", f"the app does not answer at {url}: {e}; start it first, or name another --url")


def fail(code: str, why: str, *, status: int = 1) -> NoReturn:
    err.print(Text.assemble((code, "red"), f": {why}"), soft_wrap=True)
    raise typer.Exit(status)

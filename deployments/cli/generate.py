"""`fluxfill generate`: a job of pictures, posted over HTTP and followed to its end."""

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_delay

from serve_app.adapters.loopback import bypass_proxies
from serve_app.errors import Unavailable
from serve_app.jobs.record import State

from .screen import Screen

out = Screen()
err = Screen(stderr=True)

#: How long an app may be away, in seconds: as long as one takes to be replaced.
OUTAGE_S = 120.0
#: Between two tries, in seconds, where the app does not say.
RETRY_S = 1.0
#: An event stream that is silent for longer is cut.
SILENCE_S = 60.0


class Refused(Exception):
    """The app answered with a problem (RFC 9457)."""

    def __init__(self, answer: httpx.Response) -> None:
        try:
            problem = answer.json()
        except ValueError:
            problem = {}
        self.status, self.code = answer.status_code, str(problem.get("code", answer.status_code))
        self.detail = str(problem.get("detail", answer.reason_phrase))
        self.retry_after_s = float(answer.headers.get("Retry-After", RETRY_S))
        super().__init__(f"{self.code}: {self.detail}")


def _passes(error: BaseException) -> bool:
    if isinstance(error, Refused):
        return error.status in (429, 502, 503, 504) or error.code == "post_in_flight"
    return isinstance(error, httpx.TransportError)


def _pause_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after_s if isinstance(error, Refused) else RETRY_S


def _give_up(state: RetryCallState) -> NoReturn:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None, "it was tried for its error"
    raise _away(error) if isinstance(error, httpx.TransportError) else error


def _away(error: httpx.TransportError) -> Unavailable:
    return Unavailable(f"the app does not answer: {error}")


_insisting = retry(
    stop=stop_after_delay(OUTAGE_S), wait=_pause_s, retry=retry_if_exception(_passes), retry_error_callback=_give_up
)


class Server:
    """The job API of a running app. An app that is away, or too busy, is asked again for OUTAGE_S."""

    def __init__(self, url: str, key: str | None) -> None:
        bypass_proxies()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=SILENCE_S)
        #: Without the key, which is none of the blob store's business.
        self._links = httpx.Client(timeout=SILENCE_S, follow_redirects=True)

    @_insisting
    def ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """Raises Refused, Unavailable."""
        answer = self._http.request(method, path, **request)
        if answer.is_error:
            raise Refused(answer)
        body: dict[str, Any] = answer.json()
        return body

    def events(self, job_id: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each event and its data, from the job's first, over as many streams as it takes. Raises as `ask`."""
        last_id, since = "", time.monotonic()
        while True:
            try:
                headers = {"Last-Event-ID": last_id} if last_id else {}
                with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
                    if answer.status_code == 204:
                        return
                    if answer.is_error:
                        answer.read()
                        raise Refused(answer)
                    for fields in _messages(answer.iter_lines()):
                        last_id, since = fields.get("id", last_id), time.monotonic()
                        yield fields.get("event", "message"), json.loads(fields["data"])
            except httpx.TransportError as e:
                if time.monotonic() - since > OUTAGE_S:
                    raise _away(e) from e
            except Refused as e:
                if not _passes(e) or time.monotonic() - since > OUTAGE_S:
                    raise
            time.sleep(RETRY_S)

    @_insisting
    def fetch(self, url: str) -> bytes:
        answer = self._links.get(url)
        if answer.is_error:
            raise Refused(answer)
        return answer.content


def _messages(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Of an event stream, those that have data; what else there is keeps the connection open."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name:
            # Several lines of data would be joined; the app writes JSON in one.
            fields[name] = value.removeprefix(" ")
        elif not line:
            if "data" in fields:
                yield fields
            fields = {}


class _Pictures:
    """A job's pictures on their way into a folder."""

    def __init__(self, server: Server, job_id: str, folder: Path) -> None:
        self._server, self._job_id, self._folder = server, job_id, folder
        self.written: dict[str, Path] = {}

    def fetch(self) -> None:
        """Those that are stored and not here yet."""
        for one in self._server.ask("GET", f"/v1/jobs/{self._job_id}/artifacts")["artifacts"]:
            if one["id"] not in self.written:
                data, to = self._server.fetch(one["url"]), self._folder / Path(one["s3_key"]).name
                self._folder.mkdir(parents=True, exist_ok=True)
                to.write_bytes(data)
                self.written[one["id"]] = to


def generate(
    prompt: Annotated[str, typer.Argument(help="What the pictures are to show.")],
    model: Annotated[str | None, typer.Option(help="One of the app's generators; its first by default.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What they are not to show.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, 64 to 2048.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, 64 to 2048.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 100.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 0 to 100.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next ones have the next.")] = None,
    count: Annotated[int | None, typer.Option(help="Pictures, 1 to 100.")] = None,
    format: Annotated[str | None, typer.Option(help="png, jpg or webp.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="One that the model has, such as euler.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures; named after the job by default.")
    ] = None,
    url: Annotated[str, typer.Option(help="Where the app is.")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="FLUXFILL_API_KEY", help="API key with submit and read.")] = None,
) -> None:
    """Make pictures from a prompt, by a running app. Ctrl-C cancels the job."""
    given = {
        "prompt": prompt,
        "model_id": model,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "count": count,
        "format": format,
        "scheduler": scheduler,
    }
    body = {"type": "generate", **{name: value for name, value in given.items() if value is not None}}
    server = Server(url, key)
    try:
        # A request that is sent again is the same job.
        job = server.ask("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": f'"{uuid.uuid4().hex}"'})["job"]
        out.print(f"job {job['id']}", highlight=False)
        pictures = _Pictures(server, job["id"], folder or Path(job["id"]))
        with _canceled_by_interrupt(server, job["id"]):
            _follow(server, job, pictures)
            pictures.fetch()
        job = server.ask("GET", f"/v1/jobs/{job['id']}")
    except Refused as e:
        _fail(e.code, e.detail)
    for path in pictures.written.values():
        out.print(f"wrote {path}", highlight=False)
    if job["status"] != State.SUCCEEDED:
        _fail(job["error_code"] or job["status"], job["error_message"] or f"the job has {job['status']}")


def _follow(server: Server, job: Mapping[str, Any], pictures: _Pictures) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[made]}"))
    with Progress(*columns, TimeElapsedColumn(), console=out) as bar:
        count = job["summary"]["count"]
        task = bar.add_task(job["status"], total=1.0, made=f"0/{count}")
        for name, data in server.events(job["id"]):
            if name == "progress":
                bar.update(task, completed=data["progress"])
            if name in ("artifact", "snapshot"):
                pictures.fetch()
                bar.update(task, made=f"{len(pictures.written)}/{count}")
            if name in ("state", "snapshot"):
                bar.update(task, description=f"{data['status']} on {job['parameters']['model_id']}")
                if State(data["status"]).is_final:
                    return


@contextmanager
def _canceled_by_interrupt(server: Server, job_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        # One that has just ended cannot be canceled.
        with suppress(Refused):
            server.ask("POST", f"/v1/jobs/{job_id}/cancel")
        _fail("canceled", f"job {job_id} was interrupted", status=130)


def _fail(code: str, why: str, *, status: int = 1) -> NoReturn:
    err.print(Text.assemble((code, "red"), f": {why}"))
    raise typer.Exit(status)

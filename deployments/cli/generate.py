"""`fluxfill generate`: a job of pictures, posted over HTTP and followed to its end."""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.progress import Progress
from rich.text import Text
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_delay

from serve_app.adapters.loopback import bypass_proxies
from serve_app.jobs.record import State

from .screen import Screen

out, err = Screen(), Screen(stderr=True)

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


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the pictures are to show.")],
    model_id: Annotated[
        str | None, typer.Option("--model", help="One of the app's generators; its first by default.")
    ] = None,
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
    # All options say what to make, but for three.
    given = {name: value for name, value in context.params.items() if value is not None}
    body = {"type": "generate", **{name: given[name] for name in given.keys() - {"folder", "url", "key"}}}
    server = Server(url, key)
    try:
        server.check_answers()
        # A request that is sent again is the same job.
        headers = {"Idempotency-Key": f'"{uuid.uuid4().hex}"'}
        job = server.ask("POST", "/v1/jobs", json=body, headers=headers).json()["job"]
        out.print(f"job {job['id']}", highlight=False)
        try:
            job = _follow(server, job, folder or Path(job["id"]))
        except KeyboardInterrupt:
            # One that has just ended cannot be canceled.
            with suppress(Refused):
                server.ask("POST", f"/v1/jobs/{job['id']}/cancel")
            _fail("canceled", f"job {job['id']} was interrupted", status=130)
    except Refused as e:
        _fail(e.code, e.detail)
    except httpx.TransportError as e:
        _fail("unavailable", f"the app does not answer at {url}: {e}; start it first, or name another --url")
    if job["status"] != State.SUCCEEDED:
        _fail(job["error_code"] or job["status"], job["error_message"] or f"the job has {job['status']}")


def _follow(server: Server, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The job once it is over. Its pictures are written into `folder` as they land."""
    path, written = f"/v1/jobs/{job['id']}", dict[str, Path]()
    with Progress(console=out) as bar:
        task = bar.add_task(job["status"], total=1.0)

        def fetch() -> None:
            for one in server.ask("GET", f"{path}/artifacts").json()["artifacts"]:
                if one["id"] not in written:
                    data, to = server.ask("GET", one["url"]).content, folder / Path(one["s3_key"]).name
                    folder.mkdir(parents=True, exist_ok=True)
                    to.write_bytes(data)
                    written[one["id"]] = to

        def told(name: str, data: Mapping[str, Any]) -> None:
            if name == "progress":
                bar.update(task, completed=data["progress"])
            if name in ("artifact", "snapshot"):
                fetch()
            if name in ("state", "snapshot"):
                bar.update(task, description=f"{data['status']} on {job['parameters']['model_id']}")

        while not State(job["status"]).is_final:
            server.follow(f"{path}/events", told)
            job = server.ask("GET", path).json()
            # An app that is stopping ends its streams at once.
            time.sleep(0 if State(job["status"]).is_final else RETRY_S)
        fetch()
    for to in written.values():
        # A path that is broken over lines cannot be copied.
        out.print(f"wrote {to}", highlight=False, soft_wrap=True)
    return job


def _fail(code: str, why: str, *, status: int = 1) -> NoReturn:
    err.print(Text.assemble((code, "red"), f": {why}"), soft_wrap=True)
    raise typer.Exit(status)

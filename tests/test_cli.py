"""The command line as a user meets it. The service behind it is the production path without Ray: the embedded Pub/Sub
server, the real message source and worker, files and SQLite."""

import asyncio
import hashlib
import json
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import pytest
import yaml
from huggingface_hub import constants
from pydantic import SecretStr

from deployments import client
from deployments.cli import main
from deployments.client import Client
from deployments.own_ray import free_port
from serve_app import adapters
from serve_app.adapters.pubsub.embedded import EmbeddedPubSub
from serve_app.clock import utc_now
from serve_app.edit.job import Editor, edit_job_id
from serve_app.engine.flux.tiny import TinyWeights
from serve_app.engine.painting import LocalModel
from serve_app.http.auth import ApiKeys
from serve_app.jobs.lease import Pace
from serve_app.jobs.messages import EditMessage
from serve_app.jobs.notifications import Notifier
from serve_app.jobs.record import Artifact, Job, JobError, Quality, State, Timings
from serve_app.jobs.worker import Worker
from serve_app.models import BUILT_IN
from serve_app.settings import Inference, Settings

from .backends import at, make_job
from .hub_server import COMMIT, HubServer, Repo, serve
from .rig import Held, Linked, Prompts, Receivers, Scripted, jpeg, line_mask, photo, png, wait_for
from .test_weights import PAINTING, TEXT

SOUND = Path("serve_config.yaml")


@dataclass(frozen=True)
class Ended:
    """What a command left on the screen, and its exit status."""

    status: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def fluxfill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The console script, in this process; on a wide terminal, so that no line is broken in the middle of a path."""
    monkeypatch.setattr(main.out, "width", 300)
    monkeypatch.setattr(main.err, "width", 300)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fluxfill", *map(str, arguments)])
        try:
            main.main()
        except SystemExit as e:
            screen = capsys.readouterr()
            return Ended(int(e.code or 0), screen.out, screen.err)
        raise AssertionError("a console script ends with an exit status")

    return run


# -- keys


@pytest.mark.parametrize("scopes", [["submit", "read"], ["admin"]])
async def test_a_new_key_is_what_its_entry_admits(fluxfill: Command, scopes: list[str]) -> None:
    given = [] if scopes == ["submit", "read"] else ["--scope", "+".join(scopes)]
    made = [fluxfill("keys", "new", "phone-app", *given) for _ in range(2)]
    keys, entries = zip(*(ended.out.splitlines() for ended in made), strict=True)
    assert len(set(keys)) == 2 and all(len(key) == 43 for key in keys)
    for key, entry in zip(keys, entries, strict=True):
        assert key not in entry
        known, admitted = ApiKeys(SecretStr(entry), is_production=True).client(None, key)
        assert known == "phone-app" and admitted.issuperset(scopes) and ("audit" in admitted) == (scopes == ["admin"])


@pytest.mark.parametrize(
    ("id", "scope"), [("a b", "read"), ("", "read"), (f"{'x' * 30},app", "read"), ("app", "all"), ("app", "read,x")]
)
def test_a_key_that_no_app_would_take_is_not_made(fluxfill: Command, id: str, scope: str) -> None:
    ended = fluxfill("keys", "new", id, "--scope", scope)
    assert ended.status and not ended.out and ended.err


# -- the service


def write_config(folder: Path, **args: Any) -> Path:
    """The repository's config with stores and a port of its own."""
    raw = yaml.safe_load(SOUND.read_text())
    app = raw["applications"][0]
    app["args"] |= {
        "blobs": f"files:{folder}/blobs",
        "jobs": f"sqlite:{folder}/jobs.db",
        "messages": {"url": f"embedded://127.0.0.1:{free_port()}"},
        "weights": {"cache": f"{folder}/weights", "lock": f"{folder}/weights.lock.json"},
        **args,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def settings_in(config: Path) -> Settings:
    return Settings.model_validate(yaml.safe_load(config.read_text())["applications"][0]["args"])


@contextmanager
def working(settings: Settings, engines: dict[str, Scripted]) -> Iterator[None]:
    """A worker and its message source, in an event loop of their own."""
    source = adapters.message_source(settings.messages, settings.in_flight())
    job_store = adapters.job_store(settings.jobs)
    mirror = adapters.session_mirror(settings, job_store)
    publisher, receivers = adapters.publisher(settings.messages), Receivers()
    models = {name: LocalModel(name, engine) for name, engine in engines.items()}
    editor = Editor(
        blobs=adapters.blob_store(settings.blobs),
        models=models,
        prompts=Prompts(),
        settings=settings,
        defaults=lambda: Inference(variant="telea", steps=4),
        links=Linked(),
    )
    notifier = Notifier(
        kinds=[editor],
        job_store=job_store,
        mirror=mirror,
        publisher=publisher,
        webhooks=receivers,
        settings=settings,
    )
    worker = Worker(
        kinds=[editor],
        job_store=job_store,
        mirror=mirror,
        publisher=publisher,
        notifier=notifier,
        webhooks=receivers,
        models=models,
        settings=settings,
        pace=Pace(cancel_poll_s=0.1),
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = asyncio.run_coroutine_threadsafe(source.run(worker.work), loop)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(source.close(grace_s=10), loop).result()
        running.result()
        asyncio.run_coroutine_threadsafe(notifier.close(grace_s=10), loop).result()
        worker.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass(frozen=True)
class Service:
    config: Path
    folder: Path
    settings: Settings
    #: Paints for the variant `slow`.
    slow: Scripted

    def job(self, job_id: str) -> Job:
        job = asyncio.run(adapters.job_store(self.settings.jobs).get(job_id))
        assert job is not None
        return job

    async def cancel_running(self) -> None:
        client = Client(self.settings)
        (job,) = await client.list(status=State.RUNNING)
        await client.cancel(job.id)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    work = {"backoff_s": 0.2}
    config = write_config(folder, variants={"telea": {}, "slow": {"definition": {"family": "telea"}}}, work=work)
    (folder / "photo.jpg").write_bytes(jpeg(photo()))
    (folder / "mask.png").write_bytes(png(line_mask()))
    (folder / "notes.txt").write_text("no picture")
    (folder / "other.png").write_bytes(png(line_mask(80, 200)))
    settings, slow = settings_in(config), Scripted()
    with EmbeddedPubSub.of(settings.messages), working(settings, {"telea": Scripted(), "slow": slow}):
        yield Service(config, folder, settings, slow)


@pytest.fixture
def submit(fluxfill: Command, service: Service, tmp_path: Path) -> Command:
    def run(*options: object, mask: str = "mask.png") -> Ended:
        files = ("--original", service.folder / "photo.jpg", "--mask", service.folder / mask)
        return fluxfill("submit", *files, "--out", tmp_path / "out", "-c", service.config, *options)

    return run


def job_id_in(text: str) -> str:
    found = re.search(r"job (edit-[0-9a-f]{32})", text)
    assert found is not None, text
    return found[1]


# -- submit


@pytest.mark.slow
def test_submit_follows_the_job_and_writes_the_result(submit: Command, service: Service, tmp_path: Path) -> None:
    more = ("--mask-grow", 0)
    ended = submit(
        *more, "--user", "ann", "--session", "s1", "--steps", 6, "--seed", 5, "--crop", "resize", "--strength", 0.8
    )
    assert (ended.status, ended.err) == (0, "")
    job = service.job(job_id_in(ended.out))
    assert (job.user_id, job.session_id, job.parameters.steps, job.seed) == ("ann", "s1", 6, 5)
    assert (job.parameters.crop_strategy, job.parameters.strength, job.parameters.mask_grow) == ("resize", 0.8, 0)
    for told in (f"session ann/s1, job {job.id}", "succeeded on telea", "6/6", "engine_s"):
        assert told in ended.out
    for name in ("edited.jpg", "preview.jpg"):
        assert f"wrote {tmp_path}/out/{name}" in ended.out
        assert cv2.imread(str(tmp_path / "out" / name)).shape == photo().shape


@pytest.mark.slow
def test_a_session_of_its_own_is_made_where_none_is_named(submit: Command) -> None:
    first, second = submit(), submit()
    assert (first.status, second.status) == (0, 0)
    assert job_id_in(first.out) != job_id_in(second.out)
    assert "session local/cli-" in first.out


@pytest.mark.slow
def test_the_same_photo_again_is_answered_by_the_finished_job(
    submit: Command, service: Service, tmp_path: Path
) -> None:
    job_id = job_id_in(submit("--session", "again").out)
    finished = service.job(job_id)
    (tmp_path / "out" / "edited.jpg").unlink()
    ended = submit("--session", "again")
    assert (ended.status, job_id_in(ended.out)) == (0, job_id)
    assert service.job(job_id) == finished
    assert (tmp_path / "out" / "edited.jpg").exists()


@pytest.mark.slow
def test_another_edits_picture_is_not_shown_as_ones_own(submit: Command, service: Service, tmp_path: Path) -> None:
    service.slow.fill, edited = 0, tmp_path / "out" / "edited.jpg"
    one, other = ("--session", "replaced", "--seed", 1), ("--session", "replaced", "--variant", "slow")
    job_id = job_id_in(submit(*one).out)
    first = edited.read_bytes()
    assert (submit(*other).status, edited.read_bytes() == first) == (0, False)
    edited.unlink()

    ended = submit(*one)
    assert (ended.status, job_id_in(ended.out)) == (1, job_id)
    assert ended.err.startswith("result_replaced: users/local/sessions/replaced/")
    assert "fluxfill submit --again" in ended.err and "wrote" not in ended.out
    assert not edited.exists()

    again = submit(*one, "--again")
    assert (again.status, again.err, edited.read_bytes() == first) == (0, "", True)
    assert job_id_in(again.out) != job_id
    assert job_id_in(submit(*one, "--again").out) not in (job_id, job_id_in(again.out))
    service.slow.fill = None


@pytest.mark.slow
def test_an_idempotency_key_names_the_edit(submit: Command) -> None:
    ended = [submit("--session", "named", "--idempotency-key", key) for key in ("a", "a", "b")]
    assert [one.status for one in ended] == [0, 0, 0]
    first, same, other = (job_id_in(one.out) for one in ended)
    assert first == same != other
    both = submit("--session", "named", "--idempotency-key", "a", "--again")
    assert (both.status, both.out) == (2, "") and "--idempotency-key" in both.err


@pytest.mark.parametrize(("status", "ended_s_ago"), [(State.CANCELED, 3600), (State.CANCELED, 0), (State.FAILED, 0)])
def test_what_ended_and_is_asked_for_again_is_followed_to_its_new_end(
    submit: Command, service: Service, ended_s_ago: float, status: State
) -> None:
    key = f"{status} {ended_s_ago}"
    message = EditMessage.model_validate({"userId": "local", "sessionId": "wanted"})
    job_id = edit_job_id(message, versions=[], idempotency_key=key)
    old = make_job(job_id, user_id="local", session_id="wanted", status=status)
    error = JobError(code=status, message="an old end")
    end, asked_at = utc_now() - timedelta(seconds=ended_s_ago), utc_now() - timedelta(hours=2)
    put(service.config, old.evolve(error=error, asked_at=asked_at, finished_at=end))
    ended = submit("--session", "wanted", "--idempotency-key", key)
    assert (ended.status, job_id_in(ended.out)) == (0, job_id)
    assert "succeeded" in ended.out and "an old end" not in ended.out


@pytest.mark.parametrize(
    ("options", "mask", "told"),
    [
        ((), "other.png", "mask_mismatch: "),
        ((), "notes.txt", "invalid_image: "),
        (("--variant", "nope"), "mask.png", "unknown_variant: variant 'nope' is not served here; there are telea"),
    ],
)
def test_bad_input_fails_and_says_why(
    submit: Command, tmp_path: Path, options: tuple[str, ...], mask: str, told: str
) -> None:
    ended = submit(*options, mask=mask)
    assert ended.status == 1
    assert told in ended.out
    assert "failed" in ended.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--steps", "0", "steps: "),
        ("--steps", "101", "steps: "),
        ("--steps", "many", "--steps"),
        ("--guidance", "nan", "guidanceScale: "),
        ("--guidance", "100.5", "guidanceScale: "),
        ("--guidance", "high", "--guidance"),
        ("--user", "a/b", "userId: "),
        ("--session", "..", "sessionId: "),
        ("--variant", "a b", "variant: "),
        ("--prompt", "x" * 2001, "prompt: "),
        ("--seed", "-2", "seed: "),
        ("--idempotency-key", "", "attributes.idempotencyKey: "),
        ("--idempotency-key", "k" * 257, "attributes.idempotencyKey: "),
        ("--priority", "p" * 65, "attributes.priority: "),
        ("--crop", "zoom", "--crop"),
        ("--original", "nowhere.jpg", "--original"),
        ("--config", "nowhere.yaml", "nowhere.yaml"),
        ("--out", __file__, "--out"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_sent(submit: Command, option: str, value: str, named: str) -> None:
    ended = submit(option, value)
    assert ended.status in (1, 2)
    assert named in ended.err
    assert ended.out == ""


def test_without_a_broker_it_says_at_once_what_to_start(submit: Command, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    ended = submit("-c", config)
    assert (ended.status, ended.out) == (1, "")
    url = settings_in(config).messages.url
    assert (
        ended.err
        == f"broker_unavailable: nothing listens at {url}; start the app first: `serve run` with this config\n"
    )
    assert not (tmp_path / "blobs").exists() or not any((tmp_path / "blobs").rglob("*.jpg"))


@pytest.mark.slow
@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_another_programs_server_is_said_to_be_one(
    submit: Command, tmp_path: Path, greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SPEAKS_S", 0.2)
    config = write_config(tmp_path)
    host, _, port = settings_in(config).messages.url.removeprefix("embedded://").rpartition(":")

    class Greet(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(greeting)

    with socketserver.ThreadingTCPServer((host, int(port)), Greet) as other:
        Thread(target=other.serve_forever).start()
        ended = submit("-c", config)
        other.shutdown()
    assert (ended.status, ended.out) == (1, "")
    assert "is no Pub/Sub server" in ended.err and "messages.url" in ended.err


@pytest.fixture
def held(service: Service) -> Iterator[Held]:
    """The variant `slow` stops inside its first paint until the test lets it go."""
    held = service.slow.on_paint = Held()
    yield held
    held.let_go.set()


@pytest.mark.slow
def test_it_stops_waiting_after_the_timeout_and_says_how_to_go_on(
    submit: Command, service: Service, held: Held
) -> None:
    ended = submit("--variant", "slow", "--timeout", "0.5")
    assert ended.status == 1
    job_id = job_id_in(ended.out)
    assert f"no result within 0.5 s; see: fluxfill jobs show {job_id}" in ended.err
    held.let_go.set()
    wait_for(lambda: service.job(job_id).status == State.SUCCEEDED)


def test_a_job_canceled_meanwhile_ends_the_wait(submit: Command, service: Service) -> None:
    pace = threading.Event()

    def cancel(step: int) -> None:
        if step == 1:
            asyncio.run(service.cancel_running())
        pace.wait(0.05)

    service.slow.on_step = cancel
    done = service.slow.steps_done
    ended = submit("--variant", "slow", "--steps", 100)
    service.slow.on_step = lambda step: None
    assert ended.status == 1
    assert "canceled: canceled by a user" in ended.out
    assert service.slow.steps_done - done < 100


# -- jobs


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """A config whose job store holds a job in each of three states."""
    config = write_config(tmp_path)
    error = JobError(code="mask_mismatch", message="the mask is too wide")
    put(config, make_job("edit-queued", session_id="q", created_at=at(1)))
    put(config, make_job("edit-failed", session_id="f", created_at=at(2), status=State.FAILED, error=error))
    timings = Timings(engine_s=1.25)
    artifacts = {"edited": "users/u/sessions/d/edited.jpg", "preview": "users/u/sessions/d/preview.jpg"}
    done = make_job("edit-done", session_id="d", created_at=at(3), status=State.SUCCEEDED, timings=timings, cost=0.0125)
    written = [Artifact(role=role, path=path, version=write_blob(config, path)) for role, path in artifacts.items()]
    quality = Quality(put_back=0.912, seed=8, tries=2, verdict="suspect")
    put(config, done.evolve(artifacts=tuple(written), quality=quality))
    return config


def write_blob(config: Path, path: str) -> str:
    """Its version."""
    blobs = adapters.blob_store(settings_in(config).blobs)
    return asyncio.run(blobs.put(path, b"picture", content_type="image/jpeg")).version


def put(config: Path, job: Job) -> None:
    asyncio.run(adapters.job_store(settings_in(config).jobs).update(job.id, job.lock_key, lambda *_: (job,)))


def listed(ended: Ended) -> list[str]:
    assert (ended.status, ended.err) == (0, "")
    return re.findall(r"edit-\w+", ended.out)


def test_jobs_lists_the_newest_first_with_session_status_and_error(fluxfill: Command, jobs: Path) -> None:
    ended = fluxfill("jobs", "-c", jobs)
    assert listed(ended) == ["edit-done", "edit-failed", "edit-queued"]
    for told in ("u/q", "failed", "mask_mismatch", "telea"):
        assert told in ended.out


def test_jobs_lists_only_what_is_asked_for(fluxfill: Command, jobs: Path) -> None:
    assert listed(fluxfill("jobs", "--status", "failed", "-c", jobs)) == ["edit-failed"]
    assert listed(fluxfill("jobs", "--limit", 2, "-c", jobs)) == ["edit-done", "edit-failed"]
    assert "--status" in fluxfill("jobs", "--status", "lost", "-c", jobs).err


def test_an_id_is_whole_on_a_narrow_terminal(
    fluxfill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, id = write_config(tmp_path), "edit-" + "0123456789abcdef" * 2
    put(config, make_job(id, user_id="u" * 20, session_id="s" * 20))
    monkeypatch.setattr(main.out, "width", 80)
    assert listed(fluxfill("jobs", "-c", config)) == [id]


def test_a_posted_job_fits_a_narrow_terminal(
    fluxfill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, id = write_config(tmp_path), "edit-" + "0" * 27
    put(config, make_job(id, variant="tiny-flux-dev", status=State.SUCCEEDED))
    monkeypatch.setattr(main.out, "width", 80)
    shown = fluxfill("jobs", "-c", config).out
    for told in (id, "tiny-flux-dev", "succeeded", f"{at(0):%m-%d}"):
        assert told in shown
    assert "…" not in shown


def test_one_job_is_shown_in_full(fluxfill: Command, jobs: Path) -> None:
    done = fluxfill("jobs", "show", "edit-done", "-c", jobs)
    assert done.status == 0
    for told in ("succeeded", "u/d", "28", "engine_s", "1.250", "0.012500", "suspect: 0.91 put back, tries: 2"):
        assert told in done.out
    assert "mask_mismatch: the mask is too wide" in fluxfill("jobs", "show", "edit-failed", "-c", jobs).out


def test_a_prompt_reaches_the_terminal_without_its_control_characters(fluxfill: Command, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    job = make_job("edit-1")
    prompt = "grass\x1b]52;c;aGk=\x07 and\x1b[2J\x9b0m stone\nand sand"
    put(config, job.evolve(parameters=job.parameters.model_copy(update={"prompt": prompt})))
    shown = fluxfill("jobs", "show", "edit-1", "-c", config).out
    assert "grass]52;c;aGk= and[2J0m stone" in shown and "and sand" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


def test_options_before_a_subcommand_are_not_dropped(fluxfill: Command) -> None:
    ended = fluxfill("jobs", "-c", "prod.yaml", "show", "edit-done")
    assert (ended.status, ended.out) == (2, "")
    assert "--config must come after `show`" in ended.err


def test_a_job_that_waits_is_canceled(fluxfill: Command, jobs: Path) -> None:
    ended = fluxfill("jobs", "cancel", "edit-queued", "-c", jobs)
    assert (ended.status, ended.out) == (0, "edit-queued canceled\n")
    assert listed(fluxfill("jobs", "--status", "canceled", "-c", jobs)) == ["edit-queued"]
    document = asyncio.run(adapters.job_store(settings_in(jobs).jobs).read_session("u", "q"))
    assert document is not None and document["processingStatus"] == "canceled"


def test_a_session_is_canceled_with_what_waits(fluxfill: Command, jobs: Path) -> None:
    [queued] = [job for job in _stored(jobs) if job.id == "edit-queued"]
    ended = fluxfill("jobs", "cancel", "--session", queued.lock_key, "-c", jobs)
    assert (ended.status, ended.out) == (0, "edit-queued canceled\n")
    again = fluxfill("jobs", "cancel", "--session", queued.lock_key, "-c", jobs)
    assert (again.status, again.out) == (0, "no job had started; waiting messages will not start\n")
    store = adapters.job_store(settings_in(jobs).jobs)
    assert asyncio.run(store.canceled_until(queued.lock_key)) is not None


def _stored(config: Path) -> list[Job]:
    return list(asyncio.run(adapters.job_store(settings_in(config).jobs).list()))


@pytest.mark.parametrize("named", [[], ["edit-queued", "--session", "u/s"], ["--session", "../s"], ["--session", "u"]])
def test_what_is_to_be_canceled_must_be_said(fluxfill: Command, jobs: Path, named: list[str]) -> None:
    assert fluxfill("jobs", "cancel", *named, "-c", jobs).status != 0
    assert [job.status for job in _stored(jobs) if job.id == "edit-queued"] == [State.QUEUED]


def test_links_to_a_jobs_pictures(fluxfill: Command, jobs: Path) -> None:
    ended = fluxfill("jobs", "links", "edit-done", "--hours", "2", "-c", jobs)
    [done] = [job for job in _stored(jobs) if job.id == "edit-done"]
    local = adapters.local_links(settings_in(jobs))
    assert local is not None and ended.status == 0
    read = dict(line.split(": ", 1) for line in ended.out.splitlines())
    assert {role: local.path_of(url.rpartition("/")[2]) for role, url in read.items()} == done.paths


def test_each_picture_of_a_job_has_a_link(fluxfill: Command, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    paths = {f"image {i}": f"dreamforge/{'long' * 30}/{i}.png" for i in range(3)}
    pictures = [
        Artifact(role="image", path=path, version=write_blob(config, path), index=i)
        for i, path in enumerate(paths.values())
    ]
    put(config, make_job("edit-many", status=State.SUCCEEDED).evolve(artifacts=tuple(pictures)))
    read = dict(line.split(": ", 1) for line in fluxfill("jobs", "links", "edit-many", "-c", config).out.splitlines())
    local = adapters.local_links(settings_in(config))
    assert local is not None
    assert {label: local.path_of(url.rpartition("/")[2]) for label, url in read.items()} == paths


def test_a_job_without_pictures_is_said_to_have_none(fluxfill: Command, jobs: Path) -> None:
    ended = fluxfill("jobs", "links", "edit-failed", "-c", jobs)
    assert (ended.status, ended.out, ended.err) == (1, "", "job edit-failed is failed and has no pictures\n")


def test_there_are_no_links_to_another_edits_pictures(fluxfill: Command, jobs: Path) -> None:
    [done] = [job for job in _stored(jobs) if job.id == "edit-done"]
    unsure = tuple(artifact.model_copy(update={"version": ""}) for artifact in done.artifacts)
    put(jobs, done.evolve(id="edit-unsure", artifacts=unsure))
    write_blob(jobs, done.paths["preview"])
    for job_id in ("edit-done", "edit-unsure"):
        ended = fluxfill("jobs", "links", job_id, "-c", jobs)
        assert (ended.status, ended.out) == (1, "")
        assert ended.err.startswith("result_replaced: users/u/sessions/d/")


def test_a_job_that_is_over_is_not_canceled(fluxfill: Command, jobs: Path) -> None:
    ended = fluxfill("jobs", "cancel", "edit-done", "-c", jobs)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "illegal_transition: job edit-done is succeeded and cannot be canceled\n"


@pytest.mark.parametrize("command", ["show", "cancel"])
def test_an_unknown_job_is_said_to_be_unknown(fluxfill: Command, jobs: Path, command: str) -> None:
    ended = fluxfill("jobs", command, "edit-none", "-c", jobs)
    assert (ended.status, ended.out) == (1, "")
    assert "there is no job edit-none" in ended.err


# -- check


def test_check_tells_what_a_sound_config_runs(fluxfill: Command) -> None:
    ended = fluxfill("check", SOUND)
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"telea .* telea .* 1\.\.2 .* none", ended.out)
    assert re.search(r"tiny-Q4_0 .* flux-fill .* 0\.\.1 .* tiny:flux1-fill-dev-Q4_0\.gguf", ended.out)
    assert f"{SOUND} is valid." in ended.out


def test_check_tells_which_repositories_are_not_pinned(fluxfill: Command, tmp_path: Path) -> None:
    pinned = {"family": "flux-fill", "repo": "o/r", "file": "q.gguf", "base": "o/b", "revision": COMMIT}
    definitions = {"free": {**pinned, "revision": None}, "pinned": pinned}
    variants = {"telea": {}, **{name: {"definition": row} for name, row in definitions.items()}}
    ended = fluxfill("check", write_config(tmp_path, variants=variants))
    assert re.search(r"free .* o/r/q\.gguf .* NO ", ended.out)
    assert re.search(r"pinned .* o/r/q\.gguf .* yes ", ended.out)


def test_check_tells_every_problem_with_its_line(fluxfill: Command, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(SOUND.read_text().replace("blobs:", "blob:").replace("steps: 28", "steps: 28\n          stepz: 1"))
    ended = fluxfill("check", path)
    assert (ended.status, ended.out) == (1, "")
    (problem,) = ended.err.splitlines()
    line = path.read_text().splitlines().index("      blob: files:var/blobs") + 1
    assert problem == f"{path}: line {line}: applications.0.args.blob: unknown key"


def manifests(config: str, style: str = "|") -> str:
    """A rendered folder: a namespace, then a RayService with this Serve config."""
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "flux-fill"},
        "spec": {"serveConfigV2": config, "excludeHeadPodFromServeSvc": True},
    }
    documents = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "flux-fill"}}, service]
    return yaml.safe_dump_all(documents, default_style=style)


IN_CLUSTER = SOUND.read_text().replace("proxy_location: HeadOnly", "proxy_location: EveryNode")


def test_check_reads_the_config_in_a_manifest(fluxfill: Command, tmp_path: Path) -> None:
    path = tmp_path / "rendered.yaml"
    path.write_text(manifests(IN_CLUSTER))
    ended = fluxfill("check", path)
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"telea .* telea .* 1\.\.2 .* none", ended.out)
    assert f"{path} is valid." in ended.out


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("steps: 28", "stepz: 28", "applications.0.deployments.0.user_config.stepz", "unknown key"),
        ("EveryNode", "HeadOnly", "proxy_location", "never become ready"),
        ("port: 8000", "port: 8080", "http_options.port", "8080 is the port of Ray's metrics"),
    ],
)
def test_a_manifest_with_a_config_that_would_not_run_is_refused(
    fluxfill: Command, tmp_path: Path, old: str, new: str, where: str, what: str
) -> None:
    path = tmp_path / "rendered.yaml"
    path.write_text(manifests(IN_CLUSTER.replace(old, new, 1)))
    ended = fluxfill("check", path)
    assert ended.status == 1
    (problem,) = ended.err.splitlines()
    line = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip().endswith(new))
    assert problem.startswith(f"{path}: line {line}: RayService.flux-fill.spec.serveConfigV2.{where}: ")
    assert what in problem


def test_a_config_in_quotes_has_the_line_of_its_key(fluxfill: Command, tmp_path: Path) -> None:
    path = tmp_path / "rendered.yaml"
    path.write_text(manifests(IN_CLUSTER.replace("steps: 28", "stepz: 28"), '"'))
    line = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if "serveConfigV2" in line)
    assert fluxfill("check", path).err.startswith(f"{path}: line {line}: RayService.flux-fill.spec.serveConfigV2.")


@pytest.mark.parametrize("kind", ["RayCluster", "ConfigMap"])
def test_manifests_without_a_rayservice_are_no_config(fluxfill: Command, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rendered.yaml"
    path.write_text(manifests(IN_CLUSTER).replace("RayService", kind))
    ended = fluxfill("check", path)
    assert (ended.status, ended.err) == (
        1,
        f"{path}: the file: no RayService among the manifests has a serveConfigV2\n",
    )


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("blobs: files:", "blobs: fles:", "blobs", "the scheme 'fles' is not one of files:, "),
        ("blobs: files:", "blobs: ", "blobs", "its scheme is not one of"),
        ("jobs: sqlite:", "jobs: mysql:", "jobs", "not one of sqlite:, "),
        ("embedded://", "rabbit://", "messages.url", "not one of embedded:, pubsub:, "),
        ("embedded://127.0.0.1", "embedded://0.0.0.0", "messages.url", "on loopback only, not on 0.0.0.0"),
        ("embedded://127.0.0.1:8085", "embedded://127.0.0.1", "messages.url", "is not embedded://HOST:PORT"),
        ("text_encoder:", "weights: {mirror: nowhere}\n      text_encoder:", "weights.mirror", "not one of files:, "),
    ],
)
def test_an_address_that_no_adapter_takes_is_found_before_the_app_starts(
    fluxfill: Command, tmp_path: Path, old: str, new: str, where: str, what: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SOUND.read_text().replace(old, new, 1))
    (problem,) = fluxfill("check", path).err.splitlines()
    number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if new.splitlines()[0] in line)
    assert problem.startswith(f"{path}: line {number}: applications.0.args.{where}: ")
    assert what in problem


def test_a_lock_file_that_is_none_is_an_error_not_a_traceback(fluxfill: Command, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "weights.lock.json").write_text("{")
    for command in ("check", config), ("weights", "pull", "-c", config):
        ended = fluxfill(*command)
        assert ended.status == 1
        assert ended.err.startswith("invalid_settings: ")
        assert "weights.lock.json is not a weights lock file: " in ended.err


# -- weights


@pytest.mark.slow
def test_tiny_weights_are_written_where_they_are_wanted(fluxfill: Command, tmp_path: Path) -> None:
    ended = fluxfill("weights", "tiny", "--to", tmp_path / "tiny")
    # What torch and its kin warn of while they are imported goes to stderr.
    assert ended.status == 0, ended.err
    quants = [f"flux1-fill-dev-{quant}.gguf" for quant in ("Q4_0", "Q5_K_S", "Q8_0")]
    for name in (*quants, "flux1-dev-Q8_0.gguf", "sdxl.safetensors", "flux2-klein.safetensors"):
        (path,) = (tmp_path / "tiny").rglob(name)
        assert re.search(rf"{path}  \d+\.\d MB", ended.out)


@pytest.mark.slow
def test_a_fixed_prompt_is_encoded_into_the_blob_store(fluxfill: Command, tmp_path: Path) -> None:
    tiny = BUILT_IN["tiny-klein"].model_dump(exclude_defaults=True)
    row = {"definition": tiny | {"embeddings": "prompts/ours.safetensors"}}
    config = write_config(tmp_path, variants={"telea": {}, "ours": row})
    ended = fluxfill("weights", "embed", "ours", "-c", config)
    assert ended.status == 0 and "wrote prompts/ours.safetensors, 0.01 MB" in ended.out, ended.err
    written = tmp_path / "blobs/prompts/ours.safetensors"
    own = written.read_bytes()
    # As the checkpoint's own, which `tiny-klein` paints with.
    assert [path.read_bytes() for path in (tmp_path / "weights").rglob("prompt.safetensors")] == [own]
    assert fluxfill("weights", "embed", "ours", "--prompt", "a lawn", "-c", config).status == 0
    assert written.read_bytes() != own and b"a lawn" in written.read_bytes()
    ended = fluxfill("weights", "embed", "telea", "-c", config)
    assert ended.status == 1 and "telea has no fixed prompt" in ended.err


@pytest.fixture
def hub(tiny: TinyWeights, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on loopback with one repository of quantised weights and its base."""
    with serve() as hub:
        # As HF_ENDPOINT and HF_HUB_OFFLINE set them, which the client reads when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Otherwise the client asks its endpoint for a list that has nothing to do with weights.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        hub.repos["o/gguf"] = Repo({"q.gguf": tiny.transformer("flux1-fill-dev-Q4_0.gguf").read_bytes()})
        hub.repos["o/base"] = Repo({file: file.encode() for file in PAINTING | TEXT})
        yield hub


@pytest.fixture
def from_hub(tmp_path: Path) -> Path:
    """A config that serves one variant from that hub, and telea."""
    row = {"family": "flux-fill", "repo": "o/gguf", "file": "q.gguf", "base": "o/base"}
    return write_config(tmp_path, variants={"telea": {}, "ours": {"definition": row}})


def test_pull_pins_and_fills_a_mirror(fluxfill: Command, hub: HubServer, from_hub: Path, tmp_path: Path) -> None:
    ended = fluxfill("weights", "pull", "--pin", "--to", f"files:{tmp_path}/mirror", "-c", from_hub)
    assert (ended.status, ended.err) == (0, "")
    assert "o/gguf: 1/1 q.gguf" in ended.out
    assert f"wrote {tmp_path}/weights.lock.json" in ended.out
    repos = json.loads((tmp_path / "weights.lock.json").read_text())["repos"]
    assert {name: repo["revision"] for name, repo in repos.items()} == {"o/gguf": COMMIT, "o/base": COMMIT}
    q = hub.repos["o/gguf"].files["q.gguf"]
    assert repos["o/gguf"]["files"] == {"q.gguf": {"size": len(q), "sha256": hashlib.sha256(q).hexdigest()}}
    assert set(repos["o/base"]["files"]) == PAINTING | TEXT
    assert (tmp_path / "mirror/models/o--gguf" / COMMIT / "q.gguf").read_bytes() == q
    assert re.search(r"ours .* o/gguf/q\.gguf .* yes ", fluxfill("check", from_hub).out)


def test_pull_names_what_could_not_be_pinned_and_pins_the_rest(
    fluxfill: Command, hub: HubServer, from_hub: Path, tmp_path: Path
) -> None:
    del hub.repos["o/gguf"]
    ended = fluxfill("weights", "pull", "ours", "--pin", "-c", from_hub)
    assert ended.status == 1
    assert ended.err.startswith("not pinned: o/gguf: HF_TOKEN is not set")
    assert set(json.loads((tmp_path / "weights.lock.json").read_text())["repos"]) == {"o/base"}


def test_pull_without_the_token_a_repository_wants_says_so(
    fluxfill: Command, hub: HubServer, from_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["o/gguf"].token = "secret"
    ended = fluxfill("weights", "pull", "ours", "-c", from_hub)
    assert ended.status == 1
    assert ended.err.startswith(f"missing_token: HF_TOKEN is not set, and {hub.url} shows o/gguf")
    monkeypatch.setenv("HF_TOKEN", "secret")
    ended = fluxfill("weights", "pull", "ours", "-c", from_hub)
    assert (ended.status, ended.err) == (0, "")
    assert "secret" not in ended.out


def test_pull_takes_generators_too(fluxfill: Command, hub: HubServer, tmp_path: Path) -> None:
    hub.repos["o/dev"] = Repo({"dev.safetensors": b"{}"})
    row = {"family": "flux", "repo": "o/dev", "file": "dev.safetensors", "base": "o/base"}
    served = {"variants": {"telea": {}}, "generators": {"fake": {}, "ours": {"definition": row}}}
    config = write_config(tmp_path, **served)
    for names in ((), ("ours",)):
        ended = fluxfill("weights", "pull", *names, "-c", config)
        assert (ended.status, ended.err) == (0, "")
    assert "o/dev: 1/1 dev.safetensors" in fluxfill("weights", "pull", "--pin", "-c", config).out


def test_pull_refuses_a_variant_nobody_knows(fluxfill: Command, from_hub: Path) -> None:
    ended = fluxfill("weights", "pull", "theirs", "-c", from_hub)
    assert ended.status == 1
    assert ended.err.startswith("unknown_variant: there is no variant theirs; the built-in ones are Q4_0, ")


def test_a_mirror_that_is_none_is_refused_before_anything_is_fetched(
    fluxfill: Command, hub: HubServer, from_hub: Path
) -> None:
    ended = fluxfill("weights", "pull", "--to", "nowhere", "-c", from_hub)
    assert ended.status == 1
    assert ended.err.startswith("invalid_settings: blob store 'nowhere': its scheme is not one of files:, ")
    assert hub.requests == []


# -- help


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("", "demo submit jobs check weights"),
        ("demo", "--out --config"),
        (
            "submit",
            "--original --mask --user --session --variant --prompt --guidance --steps --seed --crop --out --timeout "
            "--config",
        ),
        ("jobs", "show cancel --status --limit --config"),
        ("jobs show", "JOB_ID --config"),
        ("jobs cancel", "JOB_ID --session --config"),
        ("jobs links", "JOB_ID --hours --config"),
        ("deadletters list", "--limit --config"),
        ("deadletters replay", "--job --reason --all --config"),
        ("check", "FILE"),
        ("weights", "tiny pull"),
        ("weights tiny", "--to"),
        ("weights pull", "VARIANTS --to --pin --config"),
    ],
)
def test_help_names_everything_a_command_takes(fluxfill: Command, command: str, options: str) -> None:
    ended = fluxfill(*command.split(), "--help")
    assert ended.status == 0
    words = re.findall(r"[\w-]+", ended.out.upper())
    assert [option for option in options.split() if option.upper() not in words] == []


@pytest.mark.slow
def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("fluxfill")
    ended = subprocess.run([script, "submit"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "Missing option '--original'" in ended.stderr

"""Webhooks call a real server on loopback, which verifies and misbehaves."""

import base64
import json
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr
from standardwebhooks import Webhook, WebhookVerificationError

from serve_app.adapters.webhooks import Webhooks
from serve_app.edit.session import session_document
from serve_app.errors import CallbackRefused, InvalidCredentials, SettingsError, WebhookFailed
from serve_app.jobs.record import Artifact, Job, JobError, Quality, State
from serve_app.settings import Secrets, WebhookSettings

from . import webhook_receiver as receivers
from .backends import at, make_job
from .webhook_receiver import Answer, Receiver

DOCUMENT = Path("docs/webhooks.md").read_text()
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def secret(letter: str, size: int = 32) -> str:
    return "whsec_" + base64.b64encode(letter.encode() * size).decode()


OLD, NEW = secret("o"), secret("n")
#: What no log and no error may show.
TOKEN = "sesame"

MakeWebhooks = Callable[..., Webhooks]


@pytest.fixture
async def make_webhooks() -> AsyncIterator[MakeWebhooks]:
    made: list[Webhooks] = []

    def make(*hosts: str, key: str | None = OLD, timeout_s: float = 10, allow_http: bool = True) -> Webhooks:
        settings = WebhookSettings(hosts=hosts, allow_http=allow_http, timeout_s=timeout_s)
        made.append(Webhooks(settings, Secrets(webhook_secret=SecretStr(key) if key else None)))
        return made[-1]

    yield make
    for webhooks in made:
        await webhooks.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receivers.serve(receivers.status(204)) as receiver:
        yield receiver


def over(authority: str, status: State = State.SUCCEEDED, *, scheme: str = "http", **changes: Any) -> Job:
    error = None if status == State.SUCCEEDED else JobError(code="why", message="Because.")
    url = f"{scheme}://{authority}/hooks?token={TOKEN}"
    return make_job(status=status, callback_url=url, error=error, finished_at=at(60), fence=3).evolve(**changes)


def told_of(authority: str, status: State = State.SUCCEEDED, **changes: Any) -> tuple[Job, str, Mapping[str, Any]]:
    job = over(authority, status, **changes)
    return job, f"edit.{job.status}", session_document(job)


@pytest.mark.parametrize(
    ("status", "told", "error"),
    [
        (State.SUCCEEDED, "completed", None),
        (State.FAILED, "failed", {"code": "why", "message": "Because."}),
        (State.CANCELED, "canceled", None),
        (State.EXPIRED, "failed", {"code": "why", "message": "Because."}),
    ],
)
async def test_it_tells_what_became_of_the_job(
    make_webhooks: MakeWebhooks, receiver: Receiver, status: State, told: str, error: object
) -> None:
    await make_webhooks(receiver.authority).call(*told_of(receiver.authority, status))
    (request,) = receiver.requests
    assert request.line == f"POST /hooks?token={TOKEN} HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    event = Webhook(OLD).verify(request.body, request.headers)
    assert (event["type"], event["timestamp"]) == (f"edit.{status}", at(60).isoformat())
    data = event["data"]
    assert (data["jobId"], data["userId"], data["sessionId"]) == ("edit-1", "u", "s")
    assert (data["processingStatus"], data["processingError"]) == (told, error)


@pytest.mark.parametrize("traceparent", [TRACEPARENT, ""])
async def test_it_carries_the_trace(make_webhooks: MakeWebhooks, receiver: Receiver, traceparent: str) -> None:
    await make_webhooks(receiver.authority).call(*told_of(receiver.authority, traceparent=traceparent))
    assert receiver.requests[0].headers.get("traceparent") == (traceparent or None)


async def test_the_id_is_the_outcomes_whatever_the_try(make_webhooks: MakeWebhooks, receiver: Receiver) -> None:
    job = over(receiver.authority)
    for told in (job, job, job.evolve(fence=4)):
        await make_webhooks(receiver.authority).call(told, "edit.succeeded", session_document(told))
    first, again, another = (request.headers["webhook-id"] for request in receiver.requests)
    assert first == again != another


async def test_it_signs_by_every_secret(make_webhooks: MakeWebhooks, receiver: Receiver) -> None:
    await make_webhooks(receiver.authority, key=f"{NEW}  {OLD}").call(*told_of(receiver.authority))
    (request,) = receiver.requests
    for known in (OLD, NEW):
        assert Webhook(known).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret("x")).verify(request.body, request.headers)


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299, 410])
async def test_it_is_told(make_webhooks: MakeWebhooks, receiver: Receiver, code: int) -> None:
    receiver.answer = receivers.status(code)
    await make_webhooks(receiver.authority).call(*told_of(receiver.authority))
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308, 400, 401, 404, 409, 429, 500, 503])
async def test_it_is_not_told_and_goes_nowhere_else(make_webhooks: MakeWebhooks, receiver: Receiver, code: int) -> None:
    elsewhere = f"Location: http://{receiver.authority}/elsewhere"
    receiver.answer = receivers.status(code, elsewhere, body=b"told-nobody")
    with pytest.raises(WebhookFailed, match=f"answered {code}") as caught:
        await make_webhooks(receiver.authority).call(*told_of(receiver.authority))
    assert caught.value.details == {"host": receiver.authority, "status": code}
    assert "told-nobody" not in str(caught.value)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("answer", [receivers.silence, receivers.endless_head])
async def test_a_slow_receiver_is_left(make_webhooks: MakeWebhooks, receiver: Receiver, answer: Answer) -> None:
    receiver.answer = answer
    with pytest.raises(WebhookFailed, match=r"within 0\.2 s"):
        await make_webhooks(receiver.authority, timeout_s=0.2).call(*told_of(receiver.authority))


async def test_the_body_of_an_answer_is_not_read(make_webhooks: MakeWebhooks, receiver: Receiver) -> None:
    receiver.answer = receivers.endless_body
    await make_webhooks(receiver.authority).call(*told_of(receiver.authority))


@pytest.mark.parametrize("answer", [b"", b"sesame and no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nsesame\r\n\r\n"])
async def test_what_is_no_answer_is_not_quoted(make_webhooks: MakeWebhooks, receiver: Receiver, answer: bytes) -> None:
    receiver.answer = receivers.text(answer)
    with pytest.raises(WebhookFailed, match="did not answer") as caught:
        await make_webhooks(receiver.authority).call(*told_of(receiver.authority))
    assert TOKEN not in str(caught.value)


async def test_nobody_listens(make_webhooks: MakeWebhooks) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        authority = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(WebhookFailed, match=f"{authority} cannot be reached"):
            await make_webhooks(authority).call(*told_of(authority))


async def test_cookies_are_not_kept(make_webhooks: MakeWebhooks, receiver: Receiver) -> None:
    receiver.answer = receivers.status(200, "Set-Cookie: a=b")
    webhooks = make_webhooks(receiver.authority)
    for _ in range(2):
        await webhooks.call(*told_of(receiver.authority))
    assert ["cookie" in request.headers for request in receiver.requests] == [False, False]


async def test_proxies_of_the_environment_are_not_used(
    make_webhooks: MakeWebhooks, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    await make_webhooks(receiver.authority).call(*told_of(receiver.authority))
    assert len(receiver.requests) == 1


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "receiver")])
    now = at(-400_000_000)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=36_500))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    clear = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "receiver.pem"
    path.write_bytes(clear + made.public_bytes(pem))
    return path


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_certificates_are_verified(
    make_webhooks: MakeWebhooks, certificate: Path, is_trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with receivers.serve(receivers.status(204), tls) as receiver:
        webhooks = make_webhooks(receiver.authority, allow_http=False)
        job = over(receiver.authority, scheme="https")
        if is_trusted:
            await webhooks.call(job, "edit.succeeded", session_document(job))
        else:
            with pytest.raises(WebhookFailed, match="CERTIFICATE_VERIFY_FAILED"):
                await webhooks.call(job, "edit.succeeded", session_document(job))
        assert len(receiver.requests) == is_trusted


HOSTS = ("hooks.example.com", "Hooks.example.com:8443", "127.0.0.1", "[::1]", "bücher.example")


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com",
        "HTTPS://HOOKS.Example.COM./a?b=c#d",
        "https://hooks.example.com:443/",
        "https://hooks.example.com:8443/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://bücher.example/",
        "https://xn--bcher-kva.example/",
    ],
)
async def test_a_listed_url_may_be_called(make_webhooks: MakeWebhooks, url: str) -> None:
    make_webhooks(*HOSTS, allow_http=False).check(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hooks.example.com/", "scheme is 'http'"),
        ("ftp://hooks.example.com/", "scheme is 'ftp'"),
        ("hooks.example.com/", "scheme is ''"),
        ("file:///etc/passwd", "scheme is 'file'"),
        ("https://example.com/", "'example.com' is not listed"),
        ("https://hooks.example.com.evil.net/", "not listed"),
        ("https://evil.net#@hooks.example.com/", "'evil.net' is not listed"),
        ("https://evil.net?@hooks.example.com/", "'evil.net' is not listed"),
        ("https://hooks.example.com../", "not listed"),
        ("https://hooks.example.com%2f.evil.net/", "not listed"),
        ("https://hooks.example.com%00.evil.net/", "not listed"),
        ("https://hooks.example.com:22/", "'hooks.example.com:22' is not listed"),
        ("https://hooks.example.com:0/", "not listed"),
        ("https://2130706433/", "'2130706433' is not listed"),
        ("https://0x7f000001/", "not listed"),
        ("https://127.1/", "not listed"),
        ("https://[::ffff:127.0.0.1]/", "not listed"),
        ("https:///hooks.example.com/", "'' is not listed"),
        ("https:hooks.example.com", "'' is not listed"),
        ("https://evil.net\\@hooks.example.com/", "user name"),
        ("https://u:sesame@hooks.example.com/", "user name"),
        ("https://sesame@hooks.example.com/", "user name"),
        ("https://u:sesame/hooks.example.com/", "not a URL"),
        ("https://0177.0.0.1/", "not a URL"),
        ("https://[::1/", "not a URL"),
        ("https://hooks.example.com/\r\nx: y", "not a URL"),
        ("", "scheme is ''"),
        ("https://hooks.example.com/" + "a" * 2048, "2074 characters; at most 2048"),
    ],
)
async def test_another_url_is_refused(make_webhooks: MakeWebhooks, url: str, why: str) -> None:
    with pytest.raises(CallbackRefused, match=re.escape(why)) as caught:
        make_webhooks(*HOSTS, allow_http=False).check(url)
    assert str(caught.value).startswith("callbackUrl: ")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("key", [None, " "])
async def test_nothing_is_called_without_a_secret(make_webhooks: MakeWebhooks, key: str | None) -> None:
    with pytest.raises(CallbackRefused, match="WEBHOOK_SECRET is not set"):
        make_webhooks(*HOSTS, key=key).check("https://hooks.example.com")


async def test_what_is_refused_is_not_called(make_webhooks: MakeWebhooks, receiver: Receiver) -> None:
    with pytest.raises(CallbackRefused, match="not listed"):
        await make_webhooks("hooks.example.com").call(*told_of(receiver.authority))
    assert receiver.requests == []


@pytest.mark.parametrize(
    "host",
    ["", "*", "*.example.com", "https://example.com", "example.com/a", "u@example.com", "a b", "a:b", "[::1", "xn--a-"],
)
async def test_a_host_that_is_none_is_a_fault_of_the_settings(make_webhooks: MakeWebhooks, host: str) -> None:
    with pytest.raises(SettingsError, match=r"webhooks\.hosts") as caught:
        make_webhooks("hooks.example.com", host)
    assert caught.value.details == {"host": host}


@pytest.mark.parametrize(
    "malformed",
    ["plain-text", "whsec_", "whsec_%%%", "whpk_" + OLD, OLD.removeprefix("whsec_"), OLD + "!", secret("s", 23),
     secret("s", 65), "whsec_é"],
)  # fmt: skip
async def test_a_malformed_secret_is_named_and_not_shown(make_webhooks: MakeWebhooks, malformed: str) -> None:
    with pytest.raises(InvalidCredentials) as caught:
        make_webhooks(key=f"{OLD} {malformed}")
    assert str(caught.value) == "WEBHOOK_SECRET: secret 2 is not whsec_ and 24 to 64 bytes in base64"
    assert (caught.value.details, caught.value.__context__) == ({}, None)


@pytest.mark.parametrize("size", [24, 25, 64])
async def test_a_secret_may_go_without_its_padding(make_webhooks: MakeWebhooks, receiver: Receiver, size: int) -> None:
    bare = secret("s", size).rstrip("=")
    await make_webhooks(receiver.authority, key=bare).call(*told_of(receiver.authority))
    assert Webhook(bare).verify(receiver.requests[0].body, receiver.requests[0].headers)


@pytest.mark.parametrize(("code", "action"), [(200, "webhook_delivered"), (410, "webhook_gone")])
async def test_the_log_tells_the_host_and_no_more_of_the_url(
    make_webhooks: MakeWebhooks, receiver: Receiver, caplog: pytest.LogCaptureFixture, code: int, action: str
) -> None:
    receiver.answer = receivers.status(code)
    with caplog.at_level(logging.DEBUG):
        await make_webhooks(receiver.authority).call(*told_of(receiver.authority))
    (record,) = [vars(record) for record in caplog.records if record.name == "serve_app.adapters.webhooks"]
    assert (record["action"], record["host"], record["job_id"]) == (action, receiver.authority, "edit-1")
    signature = receiver.requests[0].headers["webhook-signature"]
    shown = " ".join(str(vars(record)) for record in caplog.records)
    assert [word for word in (TOKEN, signature, OLD) if word in shown] == []


@contextmanager
def documented_receiver() -> Iterator[str]:
    """Host and port of the receiver of docs/webhooks.md, which is running."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    names: dict[str, Any] = {"__name__": "receiver"}
    exec(code, names)
    handler: type[BaseHTTPRequestHandler] = names["Receiver"]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_the_documented_receiver_verifies_and_takes_an_event_once(
    make_webhooks: MakeWebhooks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", NEW)
    with documented_receiver() as authority:
        webhooks = make_webhooks(authority, key=f"{OLD} {NEW}")
        for _ in range(2):
            await webhooks.call(*told_of(authority))
        with pytest.raises(WebhookFailed, match="answered 401"):
            await make_webhooks(authority, key=OLD).call(*told_of(authority))
    assert capsys.readouterr().out == "edit.succeeded s\n"


async def test_the_documented_event_is_what_arrives(make_webhooks: MakeWebhooks, receiver: Receiver) -> None:
    (example,) = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCUMENT, re.S))
    data = example["data"]
    job = over(
        receiver.authority,
        id=data["jobId"],
        user_id=data["userId"],
        session_id=data["sessionId"],
        finished_at=example["timestamp"],
        quality=Quality(put_back=0.1, seed=7, tries=1, verdict=data["quality"]),
        artifacts=tuple(Artifact(role=role, path=data[f"{role}Path"]) for role in ("edited", "preview")),
        traceparent=TRACEPARENT,
    )
    await make_webhooks(receiver.authority).call(job, "edit.succeeded", session_document(job))
    (request,) = receiver.requests
    assert json.loads(request.body) == example
    missing = {f"{name}:" for name in request.headers if name.startswith(("webhook-", "traceparent"))}
    assert len(missing) == 4
    assert {line for line in missing if f"\n{line} " not in DOCUMENT} == set()

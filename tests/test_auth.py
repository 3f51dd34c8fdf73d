"""Tokens of pushes, forged in every way we know, through the real app; and the keys they are checked by."""

import asyncio
import base64
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, get_args

import httpx
import jwt
import pytest
from pydantic import SecretStr

from serve_app.errors import (
    FluxFillError,
    Forbidden,
    QuotaExceeded,
    RateLimited,
    SettingsError,
    Unauthorized,
    Unavailable,
)
from serve_app.http import auth
from serve_app.http.app import create_app
from serve_app.http.auth import KEYS_COOLDOWN_S, KEYS_LIFESPAN_S, Access, ApiKeys, PushVerifier, Scope
from serve_app.jobs.kinds import Caller
from serve_app.settings import ApiSettings, GeneratorSettings, PushSettings, Secrets

from . import jwks_server
from .backends import make_job
from .http_service import Process, long, settings
from .jwks_server import ACCOUNT, AUDIENCE, KeyServer, SigningKey, google_claims, segment
from .rig import Rig

KEY, NEXT_KEY, STRANGER = SigningKey("key-1"), SigningKey("key-2"), SigningKey("key-1")


@pytest.fixture
def server() -> Iterator[KeyServer]:
    with jwks_server.serve() as server:
        server.keys = [KEY]
        yield server


@pytest.fixture
def process(server: KeyServer) -> Process:
    process = Process(Rig())
    process.guard(is_production=True, jwks_url=server.url)
    return process


async def push(process: Process, headers: dict[str, str]) -> tuple[httpx.Response, int]:
    """The answer, and how much of the body was read."""
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        message = {"data": base64.b64encode(b"{}").decode(), "messageId": "7"}
        yield json.dumps({"message": message}).encode()

    transport = httpx.ASGITransport(create_app(lambda: process), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        headers = {"Content-Type": "application/json", **headers}
        return await client.post("/inpaint", content=body(), headers=headers), read


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def by_hand(header: dict[str, Any], claims: dict[str, Any], key: SigningKey = KEY) -> str:
    """Signed rightly, whatever it says: PyJWT makes no token that is wrong."""
    signed = f"{segment({'alg': 'RS256', 'kid': 'key-1', **header})}.{segment({**google_claims(), **claims})}"
    return f"{signed}.{segment(jwt.get_algorithm_by_name('RS256').sign(signed.encode(), key.private))}"


def hs256(secret: bytes) -> str:
    """Signed with the public key as if it were a shared secret."""
    signed = f"{segment({'alg': 'HS256', 'kid': 'key-1'})}.{segment(google_claims())}"
    return f"{signed}.{segment(jwt.get_algorithm_by_name('HS256').sign(signed.encode(), secret))}"


def unsigned(alg: str) -> str:
    return f"{segment({'alg': alg, 'kid': 'key-1'})}.{segment(google_claims())}."


def altered(**claims: Any) -> str:
    """A good token whose payload was replaced after it was signed."""
    header, _, signature = KEY.token().split(".")
    return f"{header}.{segment({**google_claims(), **claims})}.{signature}"


def since(seconds: int) -> int:
    """So many seconds from now."""
    return int(time.time()) + seconds


#: Made when they are used, because some of them grow old.
FORGED: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "text": lambda: "let-me-in",
    "dots": lambda: "..",
    "many dots": lambda: "a.b.c.d.e",
    "not base64": lambda: "!!!.???.###",
    "no JSON": lambda: f"{segment(b'xx')}.{segment(b'yy')}.{segment(b'zz')}",
    "deep JSON": lambda: f"{segment(b'[' * 4000)}.e30.e30",
    "a header that is a list": lambda: f"{segment(b'[]')}.e30.e30",
    "payload is a list": lambda: KEY.token().split(".")[0] + "." + segment(b"[]") + ".AAAA",
    "cut": lambda: KEY.token()[:-10],
    "signature cut off": lambda: KEY.token().rpartition(".")[0] + ".",
    "signature left out": lambda: KEY.token().rpartition(".")[0],
    "altered": lambda: altered(email="stranger@p.iam.gserviceaccount.com"),
    "altered expiry": lambda: altered(exp=since(10**6)),
    "alg none": lambda: unsigned("none"),
    "alg None": lambda: unsigned("None"),
    "alg empty": lambda: unsigned(""),
    "alg RS256, unsigned": lambda: unsigned("RS256"),
    "HS256 with the public key": lambda: hs256(KEY.pem()),
    "HS256 with the modulus": lambda: hs256(KEY.jwk()["n"].encode()),
    "RS512": lambda: KEY.token(alg="RS512"),
    "PS256": lambda: KEY.token(alg="PS256"),
    "another's key of the same id": lambda: STRANGER.token(),
    "a key nobody shows": lambda: NEXT_KEY.token(),
    "no key id": lambda: by_hand({"kid": None}, {}),
    "a key id that is a path": lambda: by_hand({"kid": "../../etc/passwd"}, {}),
    "a key of its own": lambda: by_hand({"jwk": STRANGER.jwk()}, {}, STRANGER),
    "a key at a URL of its own": lambda: by_hand({"jku": "https://example.org/certs"}, {}, STRANGER),
    "a critical extension": lambda: by_hand({"crit": ["x-unknown"], "x-unknown": 1}, {}),
    "expired": lambda: KEY.token(exp=since(-60), iat=since(-3660)),
    "without exp": lambda: KEY.token(without="exp"),
    "without iat": lambda: KEY.token(without="iat"),
    "without aud": lambda: KEY.token(without="aud"),
    "without iss": lambda: KEY.token(without="iss"),
    "exp is text": lambda: KEY.token(exp="soon"),
    "exp is no number": lambda: KEY.token(exp=float("nan")),
    "of the future": lambda: KEY.token(iat=since(600), exp=since(4000)),
    "not yet": lambda: KEY.token(nbf=since(600)),
    "another audience": lambda: KEY.token(aud="https://other.example.org"),
    "a longer audience": lambda: KEY.token(aud=AUDIENCE + "/"),
    "audiences": lambda: KEY.token(aud=[AUDIENCE, "https://other.example.org"]),
    "another issuer": lambda: KEY.token(iss="https://accounts.example.org"),
    "a longer issuer": lambda: KEY.token(iss="https://accounts.google.com.example.org"),
    "part of the issuer": lambda: KEY.token(iss="accounts.google"),
    "issuers": lambda: by_hand({}, {"iss": ["https://accounts.google.com"]}),
    "enormous": lambda: KEY.token(nonce="x" * 10_000),
}


@pytest.mark.parametrize("kind", FORGED)
async def test_a_forged_token_is_refused_before_the_body_is_read(
    process: Process, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    token = FORGED[kind]()
    response, read = await push(process, bearer(token))
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized"), response.text
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"
    assert (read, process.worked) == (0, 0)
    said = response.text + caplog.text
    assert not [part for part in token.split(".") if len(part) > 8 and part in said]
    assert "push_refused" in [getattr(record, "action", "") for record in caplog.records]
    assert process.rig.metrics.total("fluxfill_pushes_refused_total", "unauthorized") == 1


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic {}", "{}", "Token {}", "Bearer{}", "Bearer {} {}", "Bearer x, Bearer {}"],
)
async def test_a_good_token_must_be_in_its_place(process: Process, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.replace("{}", KEY.token())}
    response, read = await push(process, headers)
    assert (response.status_code, read) == (401, 0)


@pytest.mark.parametrize(
    "claims",
    [
        {"email": "stranger@p.iam.gserviceaccount.com"},
        {"email": ACCOUNT.upper()},
        {"email": [ACCOUNT]},
        {"without": "email"},
        {"email_verified": False},
        {"email_verified": "true"},
        {"email_verified": 1},
        {"without": "email_verified"},
    ],
    ids=str,
)
async def test_a_good_token_of_another_account_is_forbidden(process: Process, claims: dict[str, Any]) -> None:
    response, read = await push(process, bearer(KEY.token(**claims)))
    assert (response.status_code, response.json()["code"], read) == (403, "forbidden", 0)


#: Made when they are used, too.
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "as Google makes it": dict,
    "the other issuer": lambda: {"iss": "accounts.google.com"},
    "expired on our clock alone": lambda: {"exp": since(-5), "iat": since(-3605)},
    "early on our clock alone": lambda: {"nbf": since(5)},
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_a_good_token_is_let_in(process: Process, kind: str, scheme: str) -> None:
    response, _ = await push(process, {"Authorization": f"{scheme} {KEY.token(**GOOD[kind]())}"})
    assert (response.status_code, response.json()) == (200, {"outcome": "malformed_message"})
    assert process.worked == 1


async def test_where_pushes_are_not_verified_no_token_is_asked_for() -> None:
    process = Process(Rig())
    assert (await push(process, {}))[0].status_code == 200


# Keys


class Hours:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Hours:
    return Hours()


@pytest.fixture
def verifier(server: KeyServer, clock: Hours) -> PushVerifier:
    push = PushSettings(audience=AUDIENCE, service_account=ACCOUNT)
    return PushVerifier(push, jwks_url=server.url, clock=clock)


async def test_the_keys_are_fetched_once_for_all_who_wait(server: KeyServer, verifier: PushVerifier) -> None:
    server.may_answer.clear()
    waiting = [asyncio.create_task(verifier.verify(f"Bearer {KEY.token()}")) for _ in range(20)]
    while not server.requests:
        await asyncio.sleep(0.01)
    waiting[0].cancel()  # The first to come hangs up: the others' keys come all the same.
    server.may_answer.set()
    assert await asyncio.gather(*waiting[1:]) == [None] * 19
    await verifier.verify(f"Bearer {KEY.token()}")
    assert server.requests == 1


async def test_a_new_key_is_found_and_an_old_one_ends(server: KeyServer, verifier: PushVerifier, clock: Hours) -> None:
    await verifier.verify(f"Bearer {KEY.token()}")
    server.keys = [KEY, NEXT_KEY]
    clock.now += KEYS_COOLDOWN_S
    await verifier.verify(f"Bearer {NEXT_KEY.token()}")
    server.keys = [NEXT_KEY]
    await verifier.verify(f"Bearer {KEY.token()}")
    clock.now += KEYS_LIFESPAN_S
    with pytest.raises(Unauthorized):
        await verifier.verify(f"Bearer {KEY.token()}")
    await verifier.verify(f"Bearer {NEXT_KEY.token()}")
    assert server.requests == 3


async def test_forged_key_ids_make_no_traffic(server: KeyServer, verifier: PushVerifier, clock: Hours) -> None:
    await verifier.verify(f"Bearer {KEY.token()}")
    for step in range(100):
        clock.now = KEYS_COOLDOWN_S * step / 50
        with pytest.raises(Unauthorized):
            await verifier.verify(f"Bearer {SigningKey(f'forged-{step}', STRANGER.private).token()}")
    assert server.requests == 2


async def test_what_is_no_rs256_token_makes_no_traffic(server: KeyServer, verifier: PushVerifier) -> None:
    for kind in ("text", "alg none", "HS256 with the public key", "RS512", "no key id", "enormous"):
        with pytest.raises(Unauthorized):
            await verifier.verify(f"Bearer {FORGED[kind]()}")
    assert server.requests == 0


async def test_known_keys_do_not_wait_for_a_look_at_unknown_ones(
    server: KeyServer, verifier: PushVerifier, clock: Hours
) -> None:
    await verifier.verify(f"Bearer {KEY.token()}")
    clock.now += KEYS_COOLDOWN_S
    server.may_answer.clear()
    stranger = asyncio.create_task(verifier.verify(f"Bearer {NEXT_KEY.token()}"))
    while server.requests < 2:
        await asyncio.sleep(0.01)
    await verifier.verify(f"Bearer {KEY.token()}")
    assert not stranger.done()
    server.may_answer.set()
    with pytest.raises(Unauthorized):
        await stranger


BROKEN = [(500, b""), (404, b""), (302, b""), (200, b"<html>"), (200, b"[]"), (200, b"{}"), (200, b'{"keys":[]}')]
BROKEN += [(200, b'{"keys":"x"}'), (200, b'{"keys":[{"kid":"key-1","kty":"RSA"}]}'), (200, b"\xff\xfe")]


@pytest.mark.parametrize("answer", BROKEN, ids=str)
async def test_without_keys_pubsub_is_to_come_again(
    server: KeyServer, process: Process, answer: tuple[int, bytes]
) -> None:
    server.answer = answer
    response, read = await push(process, bearer(KEY.token()))
    assert (response.status_code, response.json()["code"], read) == (503, "unavailable", 0)


async def test_a_server_that_is_gone_is_asked_once_in_a_while(
    server: KeyServer, verifier: PushVerifier, clock: Hours
) -> None:
    server.answer = (503, b"")
    for _ in range(10):
        with pytest.raises(Unavailable):
            await verifier.verify(f"Bearer {KEY.token()}")
    assert server.requests == 1
    server.answer = None
    clock.now += KEYS_COOLDOWN_S
    await verifier.verify(f"Bearer {KEY.token()}")


async def test_keys_that_are_known_outlive_an_outage(server: KeyServer, verifier: PushVerifier, clock: Hours) -> None:
    await verifier.verify(f"Bearer {KEY.token()}")
    server.answer = (503, b"")
    clock.now += KEYS_LIFESPAN_S / 2
    with pytest.raises(Unavailable):
        await verifier.verify(f"Bearer {NEXT_KEY.token()}")
    await verifier.verify(f"Bearer {KEY.token()}")


async def test_a_server_that_does_not_answer_is_not_waited_for(
    server: KeyServer, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "KEYS_TIMEOUT_S", 0.05)
    server.may_answer.clear()
    response, _ = await push(process, bearer(KEY.token()))
    assert response.status_code == 503
    server.may_answer.set()


async def test_a_port_where_nobody_listens(process: Process) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        process.guard(is_production=True, jwks_url=f"http://127.0.0.1:{unused.getsockname()[1]}/certs")
        response, _ = await push(process, bearer(KEY.token()))
    assert response.status_code == 503


# Scopes of clients' keys

KEYS = long("plain, auditor:audit, both:jobs+audit, jobber:jobs, with:colon:audit, twice, twice:audit, writer:submit")
KEYS += long(", reader:read, root:admin")
JOBS = {"jobs", "submit", "read"}


def made(keys: str, **changes: Any) -> Access:
    return Access(settings(is_production=True), Secrets(api_keys=SecretStr(keys)), **changes)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize(
    ("key", "scopes"),
    [
        ("plain", JOBS),
        ("jobber", JOBS),
        ("auditor", {"audit"}),
        ("both", JOBS | {"audit"}),
        ("twice", JOBS | {"audit"}),
        ("with:colon", {"audit"}),
        ("writer", {"submit"}),
        ("reader", {"read"}),
        ("root", set(get_args(Scope))),
    ],
)
async def test_a_key_is_good_for_its_scopes_and_no_other(key: str, scopes: set[str]) -> None:
    access = made(KEYS)
    for scope in get_args(Scope):
        if scope in scopes:
            by_header = await access.client(f"Bearer {long(key)}", None, scope=scope)
            assert by_header == await access.client(None, long(key), scope=scope)
            assert by_header.id == f"key-{digest(long(key))[:12]}"
        else:
            with pytest.raises(Forbidden, match=f"the API key does not have the scope {scope}"):
                await access.client(f"Bearer {long(key)}", None, scope=scope)


@pytest.mark.parametrize("key", ["auditor:audit", "both:jobs+audit", "with", "jobs", "audit", ""])
async def test_a_scope_is_no_part_of_a_key(key: str) -> None:
    access = made(KEYS)
    for scope in get_args(Scope):
        with pytest.raises(Unauthorized):
            await access.client(None, long(key), scope=scope)
    assert not access.is_client(None, long(key))


@pytest.mark.parametrize(
    "entry", ["secret:", "secret:Audit", "secret:audit+", "sec:ret", "se:jobs+cret", ":audit", ":"]
)
def test_what_is_no_scope_is_refused_at_the_start_and_not_repeated(entry: str) -> None:
    with pytest.raises(SettingsError, match="API_KEYS, key 2: ") as refused:
        Access(settings(), Secrets(api_keys=SecretStr(f"fine,{entry}")))
    assert not any(part in refused.value.message.split(": ", 1)[1] for part in ("secret", "ret", "Audit", "sec"))


@pytest.mark.parametrize("entry", ["a", "x" * 19, f"{'x' * 19}:audit", "a:jobs+audit"])
def test_production_takes_no_key_that_may_be_guessed(entry: str) -> None:
    with pytest.raises(SettingsError, match="API_KEYS, key 2: in production a key has at least 20 characters"):
        ApiKeys(SecretStr(f"{'y' * 20},{entry}"), is_production=True)
    ApiKeys(SecretStr(f"{'y' * 20},{entry}"), is_production=False)


# Keys with ids


@pytest.mark.parametrize(("scopes", "good"), [("", JOBS), (":read", {"read"}), (":submit+read", {"submit", "read"})])
async def test_a_key_at_rest_is_a_digest(scopes: str, good: set[str]) -> None:
    access = made(f"{long('plain')},phone-app.2=sha256:{digest('secret').upper()}{scopes}")
    for scope in good:
        assert (await access.client(None, "secret", scope=scope)).id == "phone-app.2"
    for scope in set(get_args(Scope)) - good:
        with pytest.raises(Forbidden):
            await access.client(None, "secret", scope=scope)
    for wrong in (digest("secret"), f"sha256:{digest('secret')}", f"phone-app.2=sha256:{digest('secret')}"):
        with pytest.raises(Unauthorized):
            await access.client(None, wrong, scope="read")


ZEROS = "0" * 64
MALFORMED = ["=sha256:" + ZEROS, "a b=sha256:" + ZEROS, f"a=sha256:{ZEROS}0", f"a=sha256:{ZEROS[1:]}:read", "a=sha256:"]
MALFORMED += [f"a=sha256:{ZEROS}read", f"a=sha256:{ZEROS}:", f"a=sha256:{ZEROS}:all", f"{'a' * 65}=sha256:{ZEROS}"]
MALFORMED += [f"a=sha256:{ZEROS[1:]}g", f"a=b=sha256:{ZEROS}", f"-a=sha256:{ZEROS}", f"a=sha256: {ZEROS}"]


@pytest.mark.parametrize("entry", MALFORMED)
def test_a_malformed_digest_is_no_plain_key(entry: str) -> None:
    with pytest.raises(SettingsError, match="API_KEYS, key 2: ") as refused:
        ApiKeys(SecretStr(f"fine,{entry}"), is_production=False)
    assert "00" not in refused.value.message


async def test_keys_of_one_id_are_one_client_and_a_key_has_one_id() -> None:
    old, new = (f"app=sha256:{digest(key)}:submit" for key in ("old", "new"))
    access = made(f"{old},{new}")
    assert await access.client(None, "old", scope="submit") == await access.client(None, "new", scope="submit")
    with pytest.raises(SettingsError, match="API_KEYS: app and other are the same key"):
        made(f"{old},{old.replace('app', 'other')}")


async def test_what_a_caller_sees() -> None:
    access = made(KEYS)
    seen = {}
    for key, scope in (("writer", "submit"), ("reader", "read"), ("plain", "read"), ("root", "admin")):
        caller = await access.client(None, long(key), scope=scope)
        jobs = {"own": make_job(owner=caller.id), "another's": make_job(owner="stranger"), "message's": make_job()}
        seen[key] = [name for name, job in jobs.items() if caller.sees(job)]
    assert seen == {
        "writer": ["own"],
        "reader": ["own"],
        "plain": ["own", "message's"],
        "root": ["own", "another's", "message's"],
    }


async def test_without_keys_everybody_may_do_all_where_nobody_else_can_call() -> None:
    for scope in get_args(Scope):
        assert await Access(settings(), Secrets()).client(None, None, scope=scope) == Caller()
        with pytest.raises(Forbidden, match="has no keys"):
            await Access(settings(is_production=True), Secrets()).client(None, None, scope=scope)


@pytest.mark.parametrize("keys", [None, "", " , "])
def test_generators_that_nobody_could_call_are_refused(keys: str | None) -> None:
    secrets = Secrets(api_keys=keys and SecretStr(keys))
    given = settings(is_production=True).model_copy(update={"generators": {"fake": GeneratorSettings()}})
    with pytest.raises(SettingsError, match=r"generators: .* API_KEYS has none"):
        Access(given, secrets)
    Access(given, Secrets(api_keys=SecretStr(long("one"))))
    Access(given.model_copy(update={"messages": settings().messages}), secrets)


# Rates


class Minutes:
    """The time that `limits` counts by."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


async def test_a_key_has_so_many_requests_in_any_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Minutes()
    monkeypatch.setattr(time, "time", clock)
    api = ApiSettings(requests_per_minute=7)
    given = settings(is_production=True).model_copy(update={"api": api, "ingress_replicas": 2})
    access = Access(given, Secrets(api_keys=SecretStr(KEYS)))

    async def ask(key: str = "plain", scope: Scope = "read") -> Caller:
        return await access.client(None, long(key), scope=scope)

    for _ in range(3):
        clock.now += 10
        await ask()
    for scope in ("read", "submit"):
        with pytest.raises(RateLimited, match="more than 3 requests within a minute") as refused:
            await ask(scope=scope)
        assert refused.value.details == {"retry_after_s": 40}
    await ask("reader"), access.is_client(None, long("plain"))
    with pytest.raises(Forbidden):
        await ask(scope="audit")
    clock.now += 40.01
    await ask()
    with pytest.raises(RateLimited) as refused:
        await ask()
    assert refused.value.details == {"retry_after_s": 10}


async def test_a_replica_lets_at_least_one_request_through_and_none_without_keys_is_counted() -> None:
    few = settings().model_copy(update={"api": ApiSettings(requests_per_minute=1), "ingress_replicas": 5})
    access = Access(few, Secrets(api_keys=SecretStr("one")))
    await access.client(None, "one", scope="read")
    with pytest.raises(RateLimited):
        await access.client(None, "one", scope="read")
    is_open = Access(few, Secrets())
    for _ in range(3):
        await is_open.client(None, None, scope="read")


@pytest.mark.parametrize("error", [RateLimited("many", retry_after_s=39.2), QuotaExceeded("many", retry_after_s=40)])
async def test_too_many_are_told_when_to_come_again(process: Process, error: FluxFillError) -> None:
    async def refuse(*_: object, scope: Scope) -> Caller:
        raise error

    process.access.client = refuse  # type: ignore[method-assign]
    transport = httpx.ASGITransport(create_app(lambda: process))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        response = await client.get("/audits")
    assert (response.status_code, response.json()["code"]) == (429, error.code)
    assert response.headers["Retry-After"] == "40"


# The address that the HTTP server listens on

EVERYWHERE = ["0.0.0.0", "::", "", "192.168.1.5", "203.0.113.7", "::ffff:0.0.0.0", "0", "127.1", "app.example.org"]
EVERYWHERE += ["localhost.example.org", "127.0.0.1.example.org", "fe80::1", "host.docker.internal", " 127.0.0.1"]


@pytest.mark.parametrize("host", EVERYWHERE)
async def test_where_strangers_may_reach_it_the_app_is_in_production(host: str) -> None:
    with pytest.raises(SettingsError, match=r"push\.audience and push\.service_account"):
        Access(settings(), Secrets(), host=host)
    access = Access(settings(enabled=False), Secrets(), host=host)
    for scope in get_args(Scope):
        with pytest.raises(Forbidden, match="has no keys"):
            await access.client(None, None, scope=scope)
    with pytest.raises(SettingsError, match="at least 20 characters"):
        Access(settings(enabled=False), Secrets(api_keys=SecretStr("short")), host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost", "LOCALHOST"])
async def test_on_loopback_nobody_is_asked(host: str) -> None:
    access = Access(settings(), Secrets(), host=host)
    for scope in get_args(Scope):
        assert await access.client(None, None, scope=scope) == Caller()

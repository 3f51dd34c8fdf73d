"""A server on loopback that shows signing keys as Google does, and tokens signed with them."""

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

AUDIENCE = "https://app.example.org/inpaint"
ACCOUNT = "pusher@p.iam.gserviceaccount.com"


@dataclass(frozen=True)
class SigningKey:
    kid: str
    private: RSAPrivateKey = field(default_factory=lambda: generate_private_key(65537, 2048))

    def jwk(self) -> dict[str, Any]:
        numbers = jwt.algorithms.RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {**numbers, "kid": self.kid, "use": "sig", "alg": "RS256"}

    def pem(self) -> bytes:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def token(self, *, alg: str = "RS256", without: str = "", **claims: Any) -> str:
        """A token as Pub/Sub sends it, but for `claims`."""
        everything = {**google_claims(), **claims}
        everything.pop(without, None)
        return jwt.encode(everything, self.private, alg, headers={"kid": self.kid})


def google_claims() -> dict[str, Any]:
    now = int(time.time())
    account = {"email": ACCOUNT, "email_verified": True, "sub": "113774264463038321964", "azp": "1137742"}
    return {"aud": AUDIENCE, "iss": "https://accounts.google.com", "iat": now, "exp": now + 3600, **account}


def segment(part: dict[str, Any] | bytes) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class KeyServer:
    url: str = ""
    keys: list[SigningKey] = field(default_factory=list)
    #: Sent instead of the keys, where it is set.
    answer: tuple[int, bytes] | None = None
    requests: int = 0
    #: Answers wait for it.
    may_answer: Event = field(default_factory=Event)

    def body(self) -> tuple[int, bytes]:
        return self.answer or (200, json.dumps({"keys": [key.jwk() for key in self.keys]}).encode())


@contextmanager
def serve() -> Iterator[KeyServer]:
    shown = KeyServer()
    shown.may_answer.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"shown": shown}))
    shown.url = f"http://127.0.0.1:{server.server_port}/certs"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield shown
    finally:
        shown.may_answer.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    shown: KeyServer

    def do_GET(self) -> None:
        self.shown.requests += 1
        assert self.shown.may_answer.wait(30), "nobody let the server answer"
        status, body = self.shown.body()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...

"""Google's metadata server and signBlob on loopback, with a key whose signatures tests can verify."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

EMAIL = "worker@photos.iam.gserviceaccount.com"
TOKEN = "token-of-workload-identity"


@cache
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def service_account() -> dict[str, str]:
    """A service account's JSON, as Google writes it."""
    pem = private_key().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "type": "service_account",
        "project_id": "photos",
        "client_email": EMAIL,
        "private_key": pem.decode(),
        "token_uri": "http://127.0.0.1:1/token",
    }


@dataclass
class Google:
    address: str = ""
    #: `METHOD path` of every request.
    requests: list[str] = field(default_factory=list)
    #: Status of signBlob's answers.
    sign_status: int = 200


class _Server(ThreadingHTTPServer):
    #: Connections that may wait to be accepted. With five, some of many at once are reset on a busy machine.
    request_queue_size = 128


@contextmanager
def serve() -> Iterator[Google]:
    google = Google()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"google": google}))
    google.address = f"127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield google
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    google: Google

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.google.requests.append(f"GET {path}")
        if path.endswith("/token"):
            self._answer({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
        elif "/service-accounts/" in path:
            self._answer({"email": EMAIL, "scopes": [], "aliases": ["default"]})
        else:
            self._answer("photos" if "project-id" in path else "googleapis.com")

    def do_POST(self) -> None:
        self.google.requests.append(f"POST {self.path} {self.headers['Authorization']}")
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["payload"]
        signature = private_key().sign(base64.b64decode(payload), padding.PKCS1v15(), hashes.SHA256())
        self._answer({"keyId": "k", "signedBlob": base64.b64encode(signature).decode()}, self.google.sign_status)

    def _answer(self, body: Any, status: int = 200) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def verified(link: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> dict[str, str]:
    """The query of a signed link. Raises InvalidSignature unless the private key signed exactly this request.

    Google's description: https://cloud.google.com/storage/docs/authentication/signatures
    """
    parts = urlsplit(link)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    signature = bytes.fromhex(query.pop("X-Goog-Signature"))
    canonical_query = "&".join(f"{quote(name, safe='~')}={quote(query[name], safe='~')}" for name in sorted(query))
    names, sent = query["X-Goog-SignedHeaders"], {"host": parts.netloc, **(headers or {})}
    lines = [f"{name}:{sent[name]}" for name in names.split(";")]
    request = "\n".join([method, parts.path, canonical_query, *lines, "", names, "UNSIGNED-PAYLOAD"])
    scope = query["X-Goog-Credential"].split("/", 1)[1]
    digest = hashlib.sha256(request.encode()).hexdigest()
    signed = "\n".join(["GOOG4-RSA-SHA256", query["X-Goog-Date"], scope, digest])
    private_key().public_key().verify(signature, signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return query

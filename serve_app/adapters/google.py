"""The one firebase_admin app of this process, and whose credentials it has. The first of these that there is:

1. None are needed where STORAGE_EMULATOR_HOST or FIRESTORE_EMULATOR_HOST names an emulator.
2. Application Default Credentials: GOOGLE_APPLICATION_CREDENTIALS, gcloud's, or Workload Identity's.
3. FIREBASE_CREDENTIALS: a service account's JSON in base64.

Ambient credentials come before a key, because they expire by themselves and nobody can copy them. A key that is
therefore not used is checked all the same, and the log says that it is not used: unset it, or the ambient ones.
"""

import base64
import binascii
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import firebase_admin
import google.auth
from firebase_admin import credentials
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import DefaultCredentialsError, TransportError
from google.auth.transport.requests import Request
from pydantic import SecretStr

from ..errors import InvalidCredentials
from ..settings import Secrets

log = logging.getLogger(__name__)

#: The app's name within firebase_admin: another library may have the default one.
NAME = "flux-fill-serve"
#: Google's SDKs read these themselves; here they only say that no credentials are needed.
EMULATORS = ("STORAGE_EMULATOR_HOST", "FIRESTORE_EMULATOR_HOST")
#: What a service account's JSON must have.
FIELDS = ("type", "project_id", "client_email", "private_key", "token_uri")
#: How long a metadata server is looked for, in seconds. GKE's takes a few to answer in a new pod.
LOOK_S = 8.0
_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)


def firebase_app() -> firebase_admin.App:
    """The app, made by the first who asks; those who ask meanwhile wait and get the same app, or the same error.

    May take LOOK_S: call it in a thread. After an error the next call tries again.
    Raises InvalidCredentials for credentials that are malformed or nowhere to be found.
    """
    return _STARTS.app()


class _Starts:
    """Lets one thread at a time make the app."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Future[firebase_admin.App] | None = None

    def app(self) -> firebase_admin.App:
        with self._lock:
            made = _made()
            if made is not None:
                return made
            mine, running = self._running is None, self._running or Future()
            self._running = running
        if mine:
            self._run(running)
        return running.result()

    def _run(self, start: "Future[firebase_admin.App]") -> None:
        try:
            start.set_result(_start())
        except BaseException as e:
            # Raised by `result` in every thread that waits, this one included.
            start.set_exception(e)
        finally:
            with self._lock:
                self._running = None


_STARTS = _Starts()


def _made() -> firebase_admin.App | None:
    try:
        return firebase_admin.get_app(NAME)
    except ValueError:
        return None


def _start() -> firebase_admin.App:
    credential, project, source = _credentials(Secrets.from_environment().firebase_credentials)
    app = firebase_admin.initialize_app(credential, {"projectId": project} if project else {}, NAME)
    log.info("Using Google's services with %s", source, extra={"action": "google_credentials", "source": source})
    return app


class _NoneFound(Exception):
    pass


#: Credentials, the project they name, and what they are in words.
_Found = tuple[Credentials | credentials.Base, str | None, str]


def _credentials(key: SecretStr | None) -> _Found:
    if any(os.environ.get(name) for name in EMULATORS):
        anonymous: Credentials = AnonymousCredentials()
        return anonymous, os.environ.get("GOOGLE_CLOUD_PROJECT", "local"), "an emulator"
    certificate = _certificate(key.get_secret_value()) if key else None
    try:
        ambient, project = google.auth.default(scopes=_SCOPES, request=_bounded_request(LOOK_S))
    except Exception as e:
        if certificate is None:
            # Google documents one error; a file that cannot be read, or is of another form, has others.
            reason = (
                e if isinstance(e, DefaultCredentialsError | _NoneFound) else f"the ambient ones cannot be read: {e!r}"
            )
            raise InvalidCredentials(f"no Google credentials: FIREBASE_CREDENTIALS is not set, and {reason}") from e
        return certificate, certificate.project_id, "FIREBASE_CREDENTIALS"
    unused = ", FIREBASE_CREDENTIALS not being used" if certificate else ""
    return ambient, project, f"Application Default Credentials{unused}"


def _bounded_request(limit_s: float) -> Any:
    """A request that looks for `limit_s` seconds in all, whatever number of tries google-auth would make."""
    request: Any = Request()
    until = time.monotonic() + limit_s

    def ask(*args: Any, timeout: float = LOOK_S, **more: Any) -> Any:
        left_s = until - time.monotonic()
        try:
            return request(*args, timeout=max(min(timeout, left_s), 0.001), **more)
        except TransportError as e:
            if time.monotonic() < until:
                raise
            # Not a TransportError, after which google-auth would go on.
            raise _NoneFound(f"no metadata server answered in {limit_s:g} s") from e

    return ask


def _certificate(value: str) -> credentials.Certificate:
    """What FIREBASE_CREDENTIALS holds. Errors say what is wrong, and nothing of the value, nor do their causes."""
    account = _account(value)
    missing = [name for name in FIELDS if not isinstance(account.get(name), str) or not account[name]]
    if missing:
        raise _malformed(f"it has no {', '.join(missing)}")
    if account["type"] != "service_account":
        raise _malformed("its type is not service_account")
    try:
        return credentials.Certificate(account)
    except ValueError:
        raise _malformed("its private_key is not an RSA key in PEM") from None


def _account(value: str) -> Mapping[str, Any]:
    try:
        # Line breaks, which `base64` writes, are no part of it.
        text = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _malformed("it is not base64") from None
    try:
        account = json.loads(text)
    except ValueError:
        raise _malformed("it is base64, but not of JSON") from None
    if not isinstance(account, dict):
        raise _malformed("it is not a JSON object")
    return account


def _malformed(what: str) -> InvalidCredentials:
    return InvalidCredentials(f"FIREBASE_CREDENTIALS should be a service account's JSON in base64; {what}")

"""Whose credentials the one Firebase app has, and what they sign."""

import asyncio
import base64
import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from google.auth import iam
from google.auth.compute_engine import _metadata
from google.auth.credentials import AnonymousCredentials
from google.oauth2.service_account import Credentials as ServiceAccount

from serve_app import adapters
from serve_app.adapters import google as module
from serve_app.adapters.blobs.firebase import FirebaseBlobStore
from serve_app.adapters.google import firebase_app
from serve_app.adapters.pubsub.client import Connection
from serve_app.errors import InvalidCredentials, SettingsError, StoreUnavailable
from serve_app.settings import MessagesSettings

from .blob_servers import forget_firebase_app
from .google_servers import EMAIL, TOKEN, Google, serve, service_account, verified

PATH = "users/u/sessions/s/edited ü.jpg"


def encoded(account: object) -> str:
    return base64.b64encode(json.dumps(account).encode()).decode()


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No credentials anywhere, whatever machine this is."""
    forget_firebase_app()
    for name in ("FIREBASE_CREDENTIALS", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", *module.EMULATORS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))
    # Google's library reads NO_GCE_CHECK when it is imported.
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", True)
    yield
    forget_firebase_app()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREBASE_CREDENTIALS", encoded(service_account()))


@pytest.fixture
def workload_identity(monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    with serve() as google:
        monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", False)
        monkeypatch.setattr(_metadata, "_GCE_METADATA_HOST", google.address)
        monkeypatch.setenv("GCE_METADATA_IP", google.address)
        sign = f"http://{google.address}/v1/projects/-/serviceAccounts/{{}}:signBlob"
        monkeypatch.setattr(iam, "_IAM_SIGN_ENDPOINT", sign)
        yield google


@pytest.fixture
def ambient_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Application Default Credentials in a file; the e-mail that they are of."""
    email = "ambient@photos.iam.gserviceaccount.com"
    (tmp_path / "key.json").write_text(json.dumps({**service_account(), "client_email": email}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    return email


def email_of_app() -> str:
    credentials = firebase_app().credential.get_credential()
    assert isinstance(credentials, ServiceAccount)
    return str(credentials.service_account_email)


@pytest.mark.usefixtures("key")
def test_a_key_is_used_where_there_are_no_ambient_credentials() -> None:
    assert email_of_app() == EMAIL
    assert firebase_app().project_id == "photos"


def test_line_breaks_in_the_key_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    value = encoded(service_account())
    monkeypatch.setenv("FIREBASE_CREDENTIALS", "\n".join(value[i : i + 76] for i in range(0, len(value), 76)) + "\n")
    assert email_of_app() == EMAIL


@pytest.mark.usefixtures("key")
def test_ambient_credentials_come_first(ambient_key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert email_of_app() == ambient_key
    assert "FIREBASE_CREDENTIALS not being used" in caplog.text


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("name", module.EMULATORS)
def test_an_emulator_needs_no_credentials(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert isinstance(firebase_app().credential.get_credential(), AnonymousCredentials)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "5", '{"type": "impersonated_service_account"}', '{"type": "authorized_user"}', "\x00", "", None]
    + [
        json.dumps({"type": "external_account", "audience": "a", "subject_token_type": "t", "token_url": "u"} | wrong)
        for wrong in ({"credential_source": 3}, {})
    ],
)
def test_ambient_credentials_that_are_of_no_known_form_are_said(
    content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Google's library has an error of its own for some of them only."""
    if content is not None:
        (tmp_path / "key.json").write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path if content is None else tmp_path / "key.json"))
    with pytest.raises(InvalidCredentials, match="FIREBASE_CREDENTIALS is not set"):
        firebase_app()
    with pytest.raises(SettingsError, match="no credentials"):
        adapters.publisher(MessagesSettings(url="pubsub:", project="photos"))
    monkeypatch.setenv("FIREBASE_CREDENTIALS", encoded(service_account()))
    assert email_of_app() == EMAIL


def test_no_credentials_at_all_are_said() -> None:
    with pytest.raises(InvalidCredentials, match=r"FIREBASE_CREDENTIALS is not set.*Application Default Credentials"):
        firebase_app()


SECRET = service_account()["private_key"].splitlines()[5]
MALFORMED = {
    "not base64": f"{SECRET}%%%",
    "not of JSON": base64.b64encode(SECRET.encode()).decode(),
    "not a JSON object": encoded([SECRET]),
    "has no project_id, client_email, token_uri": encoded({"type": "service_account", "private_key": SECRET}),
    "has no private_key": encoded({**service_account(), "private_key": None}),
    "type is not service_account": encoded({**service_account(), "type": "authorized_user"}),
    "private_key is not": encoded({**service_account(), "private_key": SECRET}),
}


@pytest.mark.parametrize(("problem", "value"), MALFORMED.items(), ids=list(MALFORMED))
@pytest.mark.parametrize("is_ambient", [False, True])
def test_a_malformed_key_says_what_is_wrong_and_not_what_it_is(
    problem: str, value: str, is_ambient: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if is_ambient:
        request.getfixturevalue("ambient_key")
    monkeypatch.setenv("FIREBASE_CREDENTIALS", value)
    with pytest.raises(InvalidCredentials, match=problem) as raised:
        firebase_app()
    error: BaseException | None = raised.value
    while error is not None:
        assert SECRET not in str(error) and value not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.usefixtures("key")
def test_sixteen_threads_get_one_app() -> None:
    together = threading.Barrier(16)

    def ask(_: int) -> object:
        together.wait()
        return firebase_app()

    with ThreadPoolExecutor(16) as pool:
        apps = list(pool.map(ask, range(16)))
    assert len({id(app) for app in apps}) == 1


def test_a_failure_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(16)

    def ask(_: int) -> str:
        together.wait()
        try:
            return firebase_app().project_id or ""
        except InvalidCredentials:
            return "none"

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(16))) == {"none"}
        monkeypatch.setenv("FIREBASE_CREDENTIALS", encoded(service_account()))
        assert set(pool.map(ask, range(16))) == {"photos"}


def test_a_metadata_server_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.2)
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(InvalidCredentials, match=r"no metadata server answered in 0\.2 s"):
            firebase_app()


async def link(expires_s: int = 60) -> str:
    return await adapters.blob_store("firebase:photos.firebasestorage.app").link(PATH, expires_s=expires_s)


@pytest.mark.usefixtures("key")
async def test_a_link_is_signed_with_the_key() -> None:
    made = await link(expires_s=604_800)
    query = verified(made)
    assert query["X-Goog-Credential"].startswith(f"{EMAIL}/")
    assert query["X-Goog-Expires"] == "604800"
    host = "https://storage.googleapis.com/photos.firebasestorage.app/"
    assert made.startswith(f"{host}users/u/sessions/s/edited%20%C3%BC.jpg?")
    with pytest.raises(InvalidSignature):
        verified(made.replace("edited", "altered"))


@pytest.mark.usefixtures("key")
async def test_an_uploads_length_is_signed() -> None:
    store = adapters.blob_store("firebase:photos.firebasestorage.app")
    link = await store.upload_link(PATH, size=77, expires_s=60)
    assert link.headers == {"Content-Length": "77", "x-goog-content-length-range": "77,77"}
    assert verified(link.url, "PUT", link.headers)["X-Goog-SignedHeaders"] == "host;x-goog-content-length-range"
    for method, length in (("PUT", "77,78"), ("GET", "77,77")):
        with pytest.raises(InvalidSignature):
            verified(link.url, method, {"x-goog-content-length-range": length})


async def test_a_link_for_an_upload_is_signed_under_workload_identity(workload_identity: Google) -> None:
    link = await adapters.blob_store("firebase:photos").upload_link(PATH, size=77, expires_s=60)
    verified(link.url, "PUT", link.headers)


async def test_a_link_is_signed_under_workload_identity(workload_identity: Google) -> None:
    query = verified(await link())
    assert query["X-Goog-Credential"].startswith(f"{EMAIL}/"), "the e-mail is 'default' until the first token"
    assert workload_identity.requests[-1].endswith(f"/serviceAccounts/{EMAIL}:signBlob Bearer {TOKEN}")


async def test_links_are_signed_by_many_at_once(workload_identity: Google) -> None:
    for made in await asyncio.gather(*(link(expires_s=i + 1) for i in range(20))):
        verified(made)


async def test_a_refusal_to_sign_is_an_unavailable_store(workload_identity: Google) -> None:
    workload_identity.sign_status = 403
    with pytest.raises(StoreUnavailable, match="signBlob"):
        await link()
    workload_identity.sign_status = 200
    verified(await link())


async def test_a_person_cannot_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    person = {"type": "authorized_user", "client_id": "c", "client_secret": "s", "refresh_token": "r"}
    (tmp_path / "person.json").write_text(json.dumps(person))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "person.json"))
    with pytest.raises(StoreUnavailable, match="cannot sign links"):
        await link()


async def test_a_store_without_credentials_says_so() -> None:
    with pytest.raises(InvalidCredentials):
        await FirebaseBlobStore("firebase:bucket").head(PATH)


@pytest.mark.usefixtures("key")
def test_pubsub_is_used_with_the_same_credentials() -> None:
    connection = Connection(MessagesSettings(url="pubsub:", project="local-project"))
    assert connection._credentials.service_account_email == service_account()["client_email"]


def test_pubsub_without_any_credentials_says_so() -> None:
    with pytest.raises(SettingsError, match="credentials"):
        Connection(MessagesSettings(url="pubsub:", project="local-project"))

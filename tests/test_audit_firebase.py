"""An audit whose blobs are in Firebase Storage: Google's layout, and links that Google would take."""

import base64
import json
import re
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from serve_app import adapters
from serve_app.adapters.blobs.firebase import FirebaseBlobStore
from serve_app.audit.record import AuditStatus
from serve_app.audit.run import Auditor
from serve_app.audit.store import AuditStore
from serve_app.blobs import BlobStore
from serve_app.edit.session import session_path

from .audit_rig import QUICK, AuditRig
from .blob_servers import bucket_url, forget_firebase_app, new_bucket
from .google_servers import EMAIL, service_account, verified
from .rig import SESSION, USER, jpeg, line_mask, photo, png

pytestmark = pytest.mark.emulator

NAMES = ["a_gs2", "a_gs4", "b_gs2", "b_gs4"]


@pytest.fixture
def bucket(firebase_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The emulator's address, and the name of a new bucket."""
    name = new_bucket("firebase", firebase_port)
    bucket_url("firebase", firebase_port, name, monkeypatch)
    forget_firebase_app()
    yield f"http://127.0.0.1:{firebase_port}", name
    forget_firebase_app()


async def in_emulator(name: str) -> BlobStore:
    """A store that has connected to the emulator, with the session in it."""
    blobs = adapters.blob_store(f"firebase:{name}")
    await blobs.put(session_path(USER, SESSION, "original.jpg"), jpeg(photo()), content_type="image/jpeg")
    await blobs.put(session_path(USER, SESSION, "mask_auto.png"), png(line_mask()), content_type="image/png")
    return blobs


def signing(name: str, monkeypatch: pytest.MonkeyPatch) -> FirebaseBlobStore:
    """What signs as in production: an emulator asks for no signature."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    key = base64.b64encode(json.dumps(service_account()).encode()).decode()
    monkeypatch.setenv("FIREBASE_CREDENTIALS", key)
    forget_firebase_app()
    return FirebaseBlobStore(f"firebase:{name}")


async def test_a_run_is_stored_in_firebases_layout_with_v4_links(
    bucket: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, name = bucket
    blobs = await in_emulator(name)
    monkeypatch.setattr(blobs, "link", signing(name, monkeypatch).link)
    rig = AuditRig()
    queued = await AuditStore(rig.jobs, blobs).create(rig.request(), "audit-0123abcd")
    auditor = Auditor(
        job_store=rig.jobs,
        blobs=blobs,
        replicas=rig.replicas,
        prompts=rig.prompts,
        settings=rig.settings,
        compiler=rig._compile,
        clock=rig.clock,
        pace=QUICK,
    )
    audit = await auditor.run(queued.id, queued.attempt)
    assert audit.status == AuditStatus.SUCCEEDED

    # As another client of the bucket finds it.
    listed = httpx.get(f"{server}/storage/v1/b/{name}/o", params={"prefix": "audit/"}).raise_for_status().json()
    types = {item["name"].removeprefix(f"audit/{audit.id}/"): item["contentType"] for item in listed["items"]}
    assert {f"{cell}.png" for cell in NAMES} == {one for one in types if one.endswith(".png")}
    assert {types[f"{cell}.png"] for cell in NAMES} == {"image/png"}
    assert types["report.html"].startswith("text/html")
    assert {"REPORT.md", "results.json", "results.csv", "run.json"} <= set(types)

    def text(file: str) -> str:
        path = quote(f"audit/{audit.id}/{file}", safe="")
        return httpx.get(f"{server}/storage/v1/b/{name}/o/{path}", params={"alt": "media"}).raise_for_status().text

    results = json.loads(text("results.json"))
    for cell in results["cells"]:
        query = verified(cell["signed_url"])
        assert query["X-Goog-Algorithm"] == "GOOG4-RSA-SHA256"
        assert (query["X-Goog-Expires"], query["X-Goog-Credential"].split("/")[0]) == (str(72 * 3600), EMAIL)
        assert cell["signed_url"].startswith(
            f"https://storage.googleapis.com/{name}/audit/{audit.id}/{cell['name']}.png?"
        )
    links = set(re.findall(r"\((https://storage\.googleapis\.com/[^)]+)\)", text("REPORT.md")))
    assert {cell["signed_url"] for cell in results["cells"]} <= links

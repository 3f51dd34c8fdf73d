"""One file per outside system. A URL's scheme names the adapter, which is imported when it is first asked for.

    blobs       files:FOLDER     s3://BUCKET/PREFIX     firebase:BUCKET       memory:NAME
    jobs        sqlite:FILE      postgresql://HOST/DB   firestore:PROJECT     memory:NAME
    messages    embedded://HOST:PORT   pubsub:   pubsub://HOST:PORT           memory:NAME

Within a process all who name the same `memory:NAME` share one store. Session documents are kept in job stores.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from ..blobs import BlobStore
from ..errors import SettingsError
from ..jobs.backlog import Backlog
from ..jobs.ports import DeadLetters, JobStore, MessageSource, Publisher, SessionMirror
from ..settings import MessagesSettings, Settings
from .blobs.links import LocalLinks
from .loopback import bypass_proxies


class Row(NamedTuple):
    #: `module:Class`, the module relative to this package or absolute.
    target: str
    #: The pip extra that brings its packages; empty where the service itself depends on them.
    extra: str = ""


#: Schemes of blobs that stay on this machine.
_LOCAL = ("files:", "memory:")
BLOB_STORES = {
    "files": Row(".blobs.files:FileBlobStore"),
    "s3": Row(".blobs.s3:S3BlobStore", "s3"),
    "firebase": Row(".blobs.firebase:FirebaseBlobStore", "google"),
    "memory": Row(".memory:MemoryBlobStore"),
}
JOB_STORES = {
    "sqlite": Row(".stores.sql:SqlJobStore"),
    "postgresql": Row(".stores.sql:SqlJobStore", "postgresql"),
    "firestore": Row(".stores.firestore:FirestoreJobStore", "google"),
    "memory": Row(".memory:MemoryJobStore"),
}
MESSAGE_SOURCES = {
    "embedded": Row(".pubsub.source:PubSubSource"),
    "pubsub": Row(".pubsub.source:PubSubSource"),
    "memory": Row(".pubsub.memory:MemorySource"),
}
PUBLISHERS = {
    "embedded": Row(".pubsub.client:PubSubPublisher"),
    "pubsub": Row(".pubsub.client:PubSubPublisher"),
    "memory": Row(".pubsub.memory:MemoryPublisher"),
}
BACKLOGS = {
    "pubsub": Row(".pubsub.monitoring:MonitoredBacklog"),
    "memory": Row(".pubsub.memory:MemoryBacklog"),
}
DEAD_LETTERS = {
    "embedded": Row(".pubsub.client:PubSubDeadLetters"),
    "pubsub": Row(".pubsub.client:PubSubDeadLetters"),
    "memory": Row(".pubsub.memory:MemoryDeadLetters"),
}


def blob_store(url: str, public_url: str = "") -> BlobStore:
    """Links to blobs of this machine (`files:`, `memory:`) are served by the app, which is reached at `public_url`.

    Raises SettingsError for a scheme that is unknown or whose packages are missing; so do the others here.
    """
    made = _adapter(BLOB_STORES, url, "blob store")
    store: BlobStore = made(url, public_url) if url.startswith(_LOCAL) else made(url)
    return store


def local_links(settings: Settings) -> LocalLinks | None:
    """Where the app itself serves the links, what signs and reads them."""
    return LocalLinks(settings.blobs, settings.public_url) if settings.blobs.startswith(_LOCAL) else None


class Store(JobStore, SessionMirror, Protocol):
    """What keeps jobs can keep session documents, too, over the same connections."""


def job_store(url: str) -> Store:
    store: Store = _adapter(JOB_STORES, url, "job store")(url)
    return store


def session_mirror(settings: Settings, jobs: Store) -> SessionMirror:
    """`jobs` itself, unless the settings have session documents elsewhere."""
    return jobs if settings.sessions_url == settings.jobs else job_store(settings.sessions_url)


def message_source(settings: MessagesSettings, in_flight: int) -> MessageSource:
    """A source that has at most `in_flight` messages handled at a time, over all subscriptions."""
    source: MessageSource = _adapter(MESSAGE_SOURCES, settings.url, "message source")(settings, in_flight)
    return source


def publisher(settings: MessagesSettings) -> Publisher:
    made: Publisher = _adapter(PUBLISHERS, settings.url, "publisher")(settings)
    return made


def backlog(settings: MessagesSettings) -> Backlog | None:
    """None where the broker has no count: a server at an address. The embedded one is asked by its deployment."""
    if settings.url.startswith("embedded:") or (settings.url.startswith("pubsub:") and not settings.is_google):
        return None
    made: Backlog = _adapter(BACKLOGS, settings.url, "backlog")(settings)
    return made


def dead_letters(settings: MessagesSettings) -> DeadLetters:
    made: DeadLetters = _adapter(DEAD_LETTERS, settings.url, "dead letters")(settings)
    return made


def _adapter(table: Mapping[str, Row], url: str, what: str) -> Any:
    scheme, colon, _ = url.partition(":")
    if not colon or scheme not in table:
        known = ", ".join(f"{name}:" for name in table)
        raise SettingsError(f"{what} {url!r}: its scheme is not one of {known}", url=url)
    row = table[scheme]
    bypass_proxies()
    module, _, name = row.target.partition(":")
    try:
        return getattr(import_module(module, __name__), name)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("serve_app"):
            raise
        extra = f"[{row.extra}]" if row.extra else ""
        raise SettingsError(
            f"{what} {url!r} needs the package {e.name}: pip install 'flux-fill-serve{extra}'", url=url, package=e.name
        ) from e

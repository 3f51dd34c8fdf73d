"""Servers that job stores need: PostgreSQL and Google's Firestore emulator, each started once for all tests."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import firebase_admin
import grpc
import psycopg
import pytest
import sqlalchemy as sa
from google.auth.credentials import AnonymousCredentials
from google.cloud import firestore
from psycopg import sql
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from deployments.own_ray import free_port
from serve_app.adapters import google
from serve_app.adapters.stores.firestore_database import Firestore
from serve_app.adapters.stores.sql_tables import JOBS

from .absent import FIRESTORE, POSTGRESQL, absent

T = TypeVar("T")

HOST = "127.0.0.1"

SQL = ["sqlite", pytest.param("postgresql", marks=pytest.mark.emulator)]
KEPT = [*SQL, pytest.param("firestore", marks=pytest.mark.emulator)]
BACKENDS = ["memory", *KEPT]


@pytest.fixture(params=BACKENDS)
def jobs_url(request: pytest.FixtureRequest) -> str:
    """An empty job store."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=KEPT)
def kept_url(request: pytest.FixtureRequest) -> str:
    """An empty job store that outlives its process, and so may be another version's."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=SQL)
def sql_url(request: pytest.FixtureRequest) -> str:
    """An empty SQL database."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@contextmanager
def plain(url: str) -> Iterator[sa.Connection]:
    """A SQL database as it is stored."""
    engine = sa.create_engine(url.replace("sqlite:", "sqlite:///").replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def add_field(url: str, job_id: str) -> None:
    """Put a field into a stored record that this version does not know."""
    set_record(url, job_id, lambda record: record.replace("{", '{"hue": 1, ', 1))


def set_record(url: str, job_id: str, after: str | Callable[[str], str]) -> None:
    """Change a stored record behind the store's back."""

    def changed(record: str) -> str:
        return after if isinstance(after, str) else after(record)

    if url.startswith("firestore:"):
        database = Firestore(url)
        document = database.client.document(f"jobs/{job_id}")
        document.update({"record": changed(document.get().get("record"))})
        database.close()
    else:
        with plain(url) as connection:
            where = JOBS.c.id == job_id
            record = connection.scalars(sa.select(JOBS.c.record).where(where)).one()
            connection.execute(JOBS.update().where(where).values(record=changed(record)))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:{tmp_path}/jobs.db"


@pytest.fixture
def memory_url() -> str:
    return f"memory:{uuid.uuid4().hex}"


@pytest.fixture
def postgresql_url(postgresql_address: str) -> str:
    """A schema of its own: cheaper to make and to remove than a database."""
    name = f"t{uuid.uuid4().hex}"
    url = f"postgresql://postgres@{postgresql_address}/postgres"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    return f"{url}?options=-csearch_path%3D{name}"


@pytest.fixture
def firestore_url(firestore_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A project of its own, empty, in the emulator that FIRESTORE_EMULATOR_HOST names meanwhile."""
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", firestore_address)
    yield f"firestore:p{uuid.uuid4().hex}"
    forget_firebase_app()


def forget_firebase_app() -> None:
    """The next that wants Firebase finds the environment's credentials anew."""
    with suppress(ValueError):
        firebase_admin.delete_app(firebase_admin.get_app(google.NAME))


class Opened(Protocol):
    def __call__(self, store: T) -> T: ...


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Takes a store, which it closes after the test."""
    async with AsyncExitStack() as stack:

        def take(store: T) -> T:
            if hasattr(store, "close"):
                # In a thread: what a store waits for may come through a gate of this loop.
                stack.push_async_callback(asyncio.to_thread, store.close)
            return store

        yield take


@pytest.fixture(scope="session")
def postgresql_address() -> Iterator[str]:
    """A PostgreSQL server whose user `postgres` needs no password."""
    programs = [_find(name) for name in ("initdb", "postgres")]
    # It refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    if None in programs:
        absent(POSTGRESQL)
    initdb, postgres = map(str, programs)
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)
        new = [initdb, "--pgdata", folder, "--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8"]
        subprocess.run(new, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)
        with _postgres([postgres, "-D", folder, "-h", HOST, "-k", "", "-F", "-N", "300"], folder, user) as port:
            yield f"{HOST}:{port}"


@contextmanager
def _postgres(command: list[str], folder: str, user: str | None) -> Iterator[int]:
    """Its port: another where the first has been taken before the server had it."""
    log = Path(folder) / "log"
    for port in (free_port() for _ in range(3)):
        whole = [*command, "-p", str(port)]
        with _running(whole, stop=signal.SIGQUIT, user=user, cwd=folder, log=log) as server:
            if _answers(server, f"postgresql://postgres@{HOST}:{port}/postgres"):
                yield port
                return
    pytest.fail(f"PostgreSQL does not start: {log.read_text()}")


@pytest.fixture(scope="session")
def firestore_address() -> Iterator[str]:
    gcloud = shutil.which("gcloud")
    jar = (
        gcloud and Path(gcloud).resolve().parents[1] / "platform/cloud-firestore-emulator/cloud-firestore-emulator.jar"
    )
    if not jar or not jar.exists() or shutil.which("java") is None:
        absent(FIRESTORE)
    port = free_port()
    emulator = "com.google.cloud.datastore.emulator.firestore.CloudFirestore"
    command = ["java", "-Xmx512m", "-XX:+UseSerialGC", "-cp", str(jar), emulator, f"--host={HOST}", f"--port={port}"]
    with _running(command, stop=signal.SIGKILL), grpc.insecure_channel(f"{HOST}:{port}") as channel:
        grpc.channel_ready_future(channel).result(timeout=60)
        _warm_up(f"{HOST}:{port}")
        yield f"{HOST}:{port}"


def _warm_up(address: str) -> None:
    """The first calls to a new emulator take seconds, which the stores would not wait for."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FIRESTORE_EMULATOR_HOST", address)
        nobody = AnonymousCredentials()
        client = firestore.Client(project="warm-up", credentials=nobody)
    document = client.document("jobs/first")
    firestore.transactional(lambda transaction: transaction.set(document, {"a": 1}))(client.transaction())
    assert len(client.collection("jobs").get()) == 1
    client.close()


@contextmanager
def _running(
    command: list[str],
    *,
    stop: signal.Signals,
    user: str | None = None,
    cwd: str | None = None,
    log: Path = Path(os.devnull),
) -> "Iterator[subprocess.Popen[bytes]]":
    with (
        log.open("ab") as out,
        subprocess.Popen(command, stdout=out, stderr=out, user=user, cwd=cwd) as process,
    ):
        try:
            yield process
        finally:
            process.send_signal(stop)
            process.wait(10)


@retry(
    retry=retry_if_exception_type(psycopg.OperationalError),
    stop=stop_after_delay(60),
    wait=wait_fixed(0.05),
    reraise=True,
)
def _answers(server: "subprocess.Popen[bytes]", url: str) -> bool:
    """Once it does; False where it has ended before."""
    if server.poll() is not None:
        return False
    # What else has the port may say nothing.
    psycopg.connect(url, connect_timeout=2).close()
    return True


def _find(program: str) -> str | None:
    # Debian keeps them off the PATH.
    folders = [os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    return shutil.which(program, path=os.pathsep.join(folders))


class Gate:
    """A port before a server, which a test can close: connections break, and new ones are refused."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.port = free_port()
        self._listener: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._silenced: list[asyncio.Event] = []
        #: Cleared while nothing gets through, though connections are taken.
        self.flows = asyncio.Event()
        self.flows.set()

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._forward, HOST, self.port)

    def silence(self) -> None:
        """Nothing gets through the connections there are, which stay open; new ones work."""
        self.flows.clear()
        self._silenced.append(self.flows)
        self.flows = asyncio.Event()
        self.flows.set()

    async def close(self) -> None:
        if self._listener:
            self._listener.close()
        for silenced in self._silenced:
            silenced.set()
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(HOST, self._server_port)
        self._writers += (writer, far_writer)
        with suppress(ConnectionError):
            flows = self.flows
            await asyncio.gather(self._pipe(reader, far_writer, flows), self._pipe(far_reader, writer, flows))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
        while data := await reader.read(65536):
            await flows.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def gate(port: int) -> AsyncIterator[Gate]:
    """An open one before the server at `port`."""
    made = Gate(port)
    await made.open()
    try:
        yield made
    finally:
        made.flows.set()
        await made.close()

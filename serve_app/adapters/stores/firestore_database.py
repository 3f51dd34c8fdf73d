"""A Firestore database, used from asyncio: its work runs in threads, and every call to Google is bounded in time.

`firestore:PROJECT`, with `?database=NAME` for another database than the default one. Credentials are those of
`firebase_app`; FIRESTORE_EMULATOR_HOST names an emulator, which needs none.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partialmethod
from hashlib import sha256
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlsplit

import grpc
from google.api_core.exceptions import Aborted, AlreadyExists, FailedPrecondition, GoogleAPIError, ServiceUnavailable
from google.api_core.retry import Retry, if_exception_type
from google.auth.exceptions import GoogleAuthError
from google.cloud.firestore import Client, transactional
from google.cloud.firestore_v1.services.firestore import FirestoreClient
from google.cloud.firestore_v1.services.firestore.transports import FirestoreGrpcTransport
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from ...errors import FluxFillError, SettingsError, StoreUnavailable
from ..calls import Call, current_call
from ..google import firebase_app
from ..unforeseen import unforeseen

T = TypeVar("T")
#: Google's Client and Transaction, which publish no types.
Transaction = Any

#: How long a caller waits, in seconds.
CALL_TIMEOUT_S = 10.0
#: Limit on one call to Google, retries included, in seconds.
RPC_TIMEOUT_S = 5.0
#: Threads, and so pieces of work at a time: each waits for Google most of its time.
THREADS = 16
#: Document ids may be no longer, in bytes, nor look like these.
MAX_NAME_BYTES = 1500
_RESERVED = re.compile(r"\.\.?|__.*__")

_FAILURES = (GoogleAPIError, GoogleAuthError)
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    # gRPC would wait up to two minutes between attempts to connect.
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_BOUNDS = {
    "timeout": RPC_TIMEOUT_S,
    "retry": Retry(if_exception_type(ServiceUnavailable), initial=0.1, maximum=1.0, timeout=RPC_TIMEOUT_S),
}
#: For commits, and for queries, which Google's client would begin again for ever while one fails.
ONCE = {"timeout": RPC_TIMEOUT_S, "retry": Retry(if_exception_type())}


class Firestore:
    """One database. A caller that stops waiting, cancelled or timed out, gives its transaction up: it is rolled back,
    unless its commit is under way already, which may succeed unheard.

    Both ways of running work raise StoreUnavailable; and InvalidCredentials.
    """

    def __init__(self, url: str) -> None:
        """Reaches nothing yet. Raises SettingsError for a URL of another form."""
        parts = urlsplit(url)
        query = parse_qs(parts.query, keep_blank_values=True)
        if not re.fullmatch(r"[a-z][a-z0-9:.-]*", parts.path) or set(query) - {"database"}:
            raise SettingsError(f"job store {url!r} is not of the form firestore:PROJECT?database=NAME", url=url)
        self._project, self._database = parts.path, query.get("database", [None])[-1]
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="firestore")

    @cached_property
    def client(self) -> Any:
        """May look for credentials: use it in the work only."""
        credentials = firebase_app().credential.get_credential()
        return _BoundedClient(project=self._project, credentials=credentials, database=self._database)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work`, which reads, or writes in one call."""
        loop, call = asyncio.get_running_loop(), Call()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await loop.run_in_executor(self._threads, call.run, lambda: _translated(work))
        except TimeoutError as e:
            raise StoreUnavailable(f"Firestore did not answer within {CALL_TIMEOUT_S:g} s") from e
        finally:
            call.abandon()

    async def transact(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction, again where it met another one; what it raises undoes what it wrote."""

        def whole(transaction: Transaction) -> T:
            result = work(transaction)
            current_call().check()
            return result

        def once() -> T:
            # One attempt: Google's decorator would make the next ones at once, and all meet again.
            result: T = transactional(whole)(self.client.transaction(max_attempts=1))
            return result

        return await self.contend(once)

    async def contend(self, work: Callable[[], T]) -> T:
        """Run `work`, again where its commit met another one."""
        return await self.run(lambda: _CONTENTION.copy()(work))

    def change(self, batch: Any, read: Any, fields: Mapping[str, Any]) -> None:
        """Add a write of `fields` to `batch`, on condition that the document is as it was `read`, or still absent."""
        if read.exists:
            unchanged = self.client.write_option(last_update_time=read.update_time)
            batch.update(read.reference, fields, option=unchanged)
        else:
            batch.create(read.reference, fields)

    def commit(self, batch: Any) -> None:
        """All of it or, where a document is not as the batch wants it, nothing: `contend` then begins again."""
        current_call().check()
        try:
            batch.commit(**ONCE)
        except (AlreadyExists, FailedPrecondition) as e:
            raise Aborted(e.message) from e

    def close(self) -> None:
        self._threads.shutdown()
        # Only where it was made.
        if "client" in vars(self):
            self.client.close()


def document_name(key: str) -> str:
    """A document id for `key`: itself where Firestore takes it, else percent-encoded, and a hash where that is long.

    https://firebase.google.com/docs/firestore/quotas#collections_documents_and_fields
    """
    name = quote(key, safe="")
    if _RESERVED.fullmatch(name):
        name = name.replace("_", "%5F").replace(".", "%2E")
    return name if len(name) <= MAX_NAME_BYTES else sha256(key.encode()).hexdigest()


class _BoundedApi(FirestoreClient):  # type: ignore[misc] # publishes no types
    """Google's, whose defaults are minutes. The transactions of its Client take no others."""

    begin_transaction = partialmethod(FirestoreClient.begin_transaction, **_BOUNDS)
    batch_get_documents = partialmethod(FirestoreClient.batch_get_documents, **_BOUNDS)
    # Not again where no answer came: it may have been stored, and then the second try would seem to meet another.
    commit = partialmethod(FirestoreClient.commit, **ONCE)
    rollback = partialmethod(FirestoreClient.rollback, **_BOUNDS)


class _BoundedClient(Client):  # type: ignore[misc] # publishes no types
    @cached_property
    def _firestore_api(self) -> _BoundedApi:
        return _BoundedApi(transport=FirestoreGrpcTransport(host=self._target, channel=self._channel))

    @cached_property
    def _channel(self) -> grpc.Channel:
        if self._emulator_host:
            return grpc.insecure_channel(self._emulator_host, options=_OPTIONS)
        return FirestoreGrpcTransport.create_channel(self._target, credentials=self._credentials, options=_OPTIONS)

    def close(self) -> None:
        self._channel.close()


def _has_met_another(error: BaseException) -> bool:
    # A read raises Aborted; the decorator makes that of a commit the cause of a ValueError.
    return isinstance(error, Aborted) or (isinstance(error, ValueError) and isinstance(error.__cause__, Aborted))


_CONTENTION = Retrying(
    retry=retry_if_exception(_has_met_another),
    stop=stop_after_delay(CALL_TIMEOUT_S - 2),
    wait=wait_random_exponential(0.1, max=1.0),
    reraise=True,
)


def _translated(work: Callable[[], T]) -> T:
    try:
        return work()
    except FluxFillError:
        raise
    except _FAILURES as e:
        raise StoreUnavailable(f"Firestore cannot be used: {e}") from e
    except Exception as e:
        if current_call().is_callers(e):
            raise
        # The decorator's ValueError: the commit met another one, or there is no transaction that could be rolled back.
        cause = e.__cause__ or e.__context__
        if isinstance(cause, _FAILURES):
            raise StoreUnavailable(f"Firestore cannot be used: {cause}") from e
        raise unforeseen(StoreUnavailable, "Firestore", e) from e

"""LoRAs that clients register: checked by what their files hold, and kept as records in the blob store.

A record is at `loras/{owner}/{rest}.json`, where the id is `{owner}{rest}` and the owner a hash; a file that was
uploaded for it lies beside it. A registration that is asked for again gives the same LoRA, so a client asks, uploads,
and asks again.
"""

import asyncio
import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ..blobs import BlobInfo, BlobStore, UploadLink
from ..clock import utc_now
from ..engine.lora.host import verified_sha256
from ..errors import (
    BlobNotFound,
    BlobTooLarge,
    Forbidden,
    LoraChanged,
    LoraRefused,
    LoraTooLarge,
    MissingInput,
    NotSupported,
    QuotaExceeded,
    Unavailable,
    UnknownModel,
    UnsafePath,
)
from ..jobs.kinds import Caller
from ..models import LoraFacts, LoraUse
from ..parameters import Whole
from ..settings import LoraSettings

log = logging.getLogger(__name__)

#: How long an upload may begin after it was asked for, in seconds.
UPLOAD_S = 3600
#: Records of one owner that are read at a time.
_AT_ONCE = 8
#: Files that wait to be looked at, or are; half of them may be of one key.
_CHECKS = 8
_OWNER, _REST = 8, 24
_RECORD, _FILE = ".json", ".safetensors"
_RECORD_BYTES = 100_000

Sha256 = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]
_Line = Annotated[str, StringConstraints(max_length=128, pattern=r"\A[^\x00-\x1f\x7f]*\z")]

_EXAMPLE: Any = {"name": "my cat", "sha256": "0" * 64, "size_bytes": 131_000_000, "trigger_word": "ohwx cat"}


class LoraBody(BaseModel):
    """A LoRA to be registered: a file of this size and hash, which is then uploaded; or a blob of the store."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra={"examples": [_EXAMPLE]}
    )

    name: Annotated[_Line, StringConstraints(min_length=1)]
    version: _Line = ""
    #: What a prompt says to show what the LoRA was trained on; it is not added to prompts.
    trigger_word: _Line = ""
    sha256: Sha256 | None = None
    size_bytes: Annotated[Whole, Field(ge=1, le=2**53)] | None = None
    #: Its path in the blob store. For keys with the scope `jobs`.
    blob: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    #: For layers that do not say theirs, which otherwise is their rank.
    alpha: Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "LoraBody":
        if self.blob is None and (self.sha256 is None or self.size_bytes is None):
            raise ValueError("give sha256 and size_bytes of the file that is to be uploaded, or blob")
        return self


class Lora(BaseModel):
    """The record of one."""

    model_config = ConfigDict(frozen=True)

    id: str
    #: As `Job.owner`.
    owner: str
    name: str
    version: str
    trigger_word: str
    #: Of the blob.
    path: str
    #: The blob's when it was looked at.
    blob_version: str
    sha256: Sha256
    size_bytes: int
    alpha: float | None
    facts: LoraFacts
    created_at: AwareDatetime

    @property
    def ignores_text_encoder(self) -> bool:
        return self.facts.family == "flux" and self.facts.text_encoder_layers > 0

    def use(self, scale: float) -> LoraUse:
        low, high = sorted(scale * of for of in self.facts.alpha_scale)
        return LoraUse(
            **self.model_dump(include={"id", "name", "path", "sha256", "size_bytes", "alpha"}),
            scale=scale,
            effective_scale=(low, high),
            ignores_text_encoder=self.ignores_text_encoder,
        )


class LoraChecker(Protocol):
    @property
    def takes_loras(self) -> bool:
        """Whether a model that is served here does."""

    async def check(self, file: Path, *, alpha: float | None) -> LoraFacts:
        """Look at the whole file. Raises LoraRefused, by its kind; Unavailable."""


class Loras:
    def __init__(self, *, blobs: BlobStore, checker: LoraChecker, settings: LoraSettings) -> None:
        self._blobs, self._checker, self.settings = blobs, checker, settings
        #: A file takes room on this machine while it is looked at.
        self._checking = asyncio.Lock()
        #: By the LoRA's id. Each goes on to its end when its client leaves, who finds it done when it asks again.
        self._checks: dict[str, asyncio.Task[Lora]] = {}

    async def register(self, body: LoraBody, caller: Caller) -> Lora | UploadLink:
        """The LoRA; or where its file is to be uploaded, after which it is asked for again.

        A file that is refused is deleted, unless it is a blob that the body names. Raises LoraRefused, by its kind;
        Forbidden for a blob, MissingInput where it is not there; QuotaExceeded; NotSupported where no model takes
        LoRAs; Unavailable.
        """
        if not self._checker.takes_loras:
            raise NotSupported("no model that is served here takes LoRAs")
        if (body.size_bytes or 0) > self.settings.file_bytes:
            raise self._too_large("size_bytes", int(body.size_bytes or 0))
        if body.blob is not None and not caller.sees_messages:
            raise Forbidden("blob: the API key does not have the scope jobs", field="blob")
        lora_id = _id(body, caller)
        info = await self._blob(body, body.blob or _file(lora_id))
        stored = await self._stored(lora_id)
        if info is None or body.size_bytes not in (None, info.size):
            if stored is None:
                await self._check_quota(caller, lora_id)
            return await self._blobs.upload_link(_file(lora_id), size=int(body.size_bytes or 0), expires_s=UPLOAD_S)
        if stored is not None and stored.blob_version == info.version:
            return stored
        if info.size > self.settings.file_bytes:
            raise self._too_large("blob", info.size)
        if lora_id not in self._checks:
            own = sum(one.startswith(lora_id[:_OWNER]) for one in self._checks)
            if len(self._checks) >= _CHECKS or own >= _CHECKS / 2:
                raise Unavailable("too many files are being looked at; try again", retry_after_s=30)
            self._checks[lora_id] = asyncio.create_task(self._check(lora_id, body, info.path, caller))
            self._checks[lora_id].add_done_callback(lambda task: self._checked(lora_id, task))
        return await asyncio.shield(self._checks[lora_id])

    async def get(self, lora_id: str, caller: Caller) -> Lora:
        """Raises UnknownModel, also for one that the caller does not see; StoreUnavailable."""
        lora = await self._stored(lora_id)
        if lora is None or not caller.sees(lora):
            raise UnknownModel(f"there is no model or LoRA {lora_id}")
        return lora

    async def list(self, caller: Caller) -> Sequence[Lora]:
        """The caller's, newest first; all where it sees all. Raises StoreUnavailable."""
        folders = ["loras"] if caller.sees_all else [f"loras/{_hashed(caller.id)[:_OWNER]}"]
        if caller.sees_messages and not caller.sees_all:
            folders.append(f"loras/{_hashed('')[:_OWNER]}")
        infos = [info for folder in folders for info in [one async for one in self._blobs.list(folder)]]
        paths = [info.path for info in infos if info.path.endswith(_RECORD)]
        places = asyncio.Semaphore(_AT_ONCE)

        async def read(path: str) -> Lora | None:
            async with places:
                return await self._read(path)

        found = [lora for lora in await asyncio.gather(*map(read, paths)) if lora is not None and caller.sees(lora)]
        return sorted(found, key=lambda lora: (lora.created_at, lora.id), reverse=True)

    async def delete(self, lora_id: str, caller: Caller) -> None:
        """With the file that was uploaded for it. Jobs that name it fail, but where it is loaded
        already. Raises as `get`."""
        lora = await self.get(lora_id, caller)
        # While there is a record, it can be deleted again.
        if lora.path == _file(lora_id):
            await self._blobs.delete(lora.path)
        await self._blobs.delete(_record(lora_id))

    async def link(self, lora: Lora, expires_s: int) -> str:
        """A signed URL of its file. Raises StoreUnavailable."""
        return await self._blobs.link(lora.path, expires_s=expires_s)

    async def close(self) -> None:
        """Files that are being looked at are looked at when their clients ask again."""
        checks = list(self._checks.values())
        for task in checks:
            task.cancel()
        await asyncio.gather(*checks, return_exceptions=True)

    async def _blob(self, body: LoraBody, path: str) -> BlobInfo | None:
        """None for a file that was not uploaded yet."""
        try:
            info = await self._blobs.head(path)
        except (BlobNotFound, UnsafePath) as e:
            if body.blob is None:
                return None
            raise MissingInput(f"blob: {e.message}", field="blob") from e
        if body.blob is not None and body.size_bytes not in (None, info.size):
            raise LoraChanged(f"size_bytes: the blob has {info.size}", field="size_bytes")
        return info

    async def _check(self, lora_id: str, body: LoraBody, path: str, caller: Caller) -> Lora:
        async with self._checking:
            # Of many that are asked for at once, each was within it.
            await self._check_quota(caller, lora_id)
            try:
                with tempfile.TemporaryDirectory(prefix="lora-") as folder:
                    file = Path(folder) / "lora.safetensors"
                    info = await self._blobs.download(path, file)
                    sha256 = await asyncio.to_thread(verified_sha256, file, body.sha256, info.size)
                    facts = await self._checker.check(file, alpha=body.alpha)
            except LoraRefused:
                if path == _file(lora_id):
                    await self._blobs.delete(path)
                raise
            lora = Lora(
                **body.model_dump(include={"name", "version", "trigger_word", "alpha"}),
                id=lora_id,
                owner=caller.id,
                path=path,
                blob_version=info.version,
                sha256=sha256,
                size_bytes=info.size,
                facts=facts,
                created_at=utc_now(),
            )
            await self._blobs.put(_record(lora_id), lora.model_dump_json().encode(), content_type="application/json")
            return lora

    def _checked(self, lora_id: str, task: "asyncio.Task[Lora]") -> None:
        del self._checks[lora_id]
        # Of a client that has left, nobody reads it.
        if not task.cancelled():
            task.exception()

    async def _check_quota(self, caller: Caller, lora_id: str) -> None:
        """Whether one more is within it. Files that were uploaded and never registered make room where they are too
        many, but for those that are being looked at."""
        if not caller.id:
            return
        others = [one.path async for one in self._blobs.list(f"loras/{lora_id[:_OWNER]}")]
        others = [path for path in others if path not in (_record(lora_id), _file(lora_id))]
        records = {path for path in others if path.endswith(_RECORD)}
        if len(records) >= self.settings.per_key:
            raise QuotaExceeded(f"this key has {self.settings.per_key} LoRAs, as many as it may: delete some")
        kept = {*map(_file, self._checks), *(path.removesuffix(_RECORD) + _FILE for path in records)}
        left = [path for path in others if path not in records | kept]
        if len(records) + len(left) >= self.settings.per_key:
            for path in left:
                await self._blobs.delete(path)

    def _too_large(self, field: str, size: int) -> LoraTooLarge:
        most = self.settings.file_bytes
        return LoraTooLarge(f"{field}: a file of {size} bytes, of {most} at most (loras.file_bytes)", field=field)

    async def _stored(self, lora_id: str) -> Lora | None:
        return await self._read(_record(lora_id)) if len(lora_id) == _OWNER + _REST else None

    async def _read(self, path: str) -> Lora | None:
        try:
            data, _ = await self._blobs.get(path, max_bytes=_RECORD_BYTES)
            return Lora.model_validate_json(data)
        except (BlobNotFound, UnsafePath):
            return None
        except (ValidationError, BlobTooLarge) as e:
            # Registered again, it is written anew.
            log.error("The record %s cannot be read: %s", path, type(e).__name__, extra={"action": "damaged_record"})
            return None


def _id(body: LoraBody, caller: Caller) -> str:
    """The same for the same request."""
    what = [caller.id, body.sha256, body.size_bytes, body.blob, body.name, body.version, body.trigger_word, body.alpha]
    return _hashed(caller.id)[:_OWNER] + _hashed(json.dumps(what))[:_REST]


def _record(lora_id: str) -> str:
    return f"loras/{lora_id[:_OWNER]}/{lora_id[_OWNER:]}{_RECORD}"


def _file(lora_id: str) -> str:
    return f"loras/{lora_id[:_OWNER]}/{lora_id[_OWNER:]}{_FILE}"


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""LoRAs that clients register: checked by what their files hold, and kept as records in the blob store.

A record is at `loras/{owner}/{rest}.json`, where the id is `{owner}{rest}` and the owner a hash; an uploaded file at
`models/{id}/lora.safetensors`. A registration that is asked for again gives the same LoRA, so a client asks, uploads,
and asks again.
"""

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ..blobs import BlobInfo, BlobStore, UploadLink
from ..clock import utc_now
from ..errors import (
    BlobConflict,
    BlobNotFound,
    Forbidden,
    LoraChanged,
    LoraRefused,
    LoraTooLarge,
    MissingInput,
    QuotaExceeded,
    Truncated,
    UnknownModel,
    UnsafePath,
)
from ..jobs.kinds import Caller
from ..models import LoraFacts, LoraUse
from ..parameters import Whole
from ..settings import LoraSettings

#: How long an upload may begin after it was asked for, in seconds.
UPLOAD_S = 3600
#: Records of one owner that are read at a time.
_AT_ONCE = 8
_OWNER, _REST = 8, 24
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
    async def check(self, file: Path, *, alpha: float | None) -> LoraFacts:
        """Look at the whole file. Raises LoraRefused, by its kind; NotSupported where no model takes LoRAs here;
        Unavailable."""


class Loras:
    def __init__(self, *, blobs: BlobStore, checker: LoraChecker, settings: LoraSettings) -> None:
        self._blobs, self._checker, self.settings = blobs, checker, settings
        #: A file takes room on this machine while it is looked at.
        self._checking = asyncio.Lock()

    async def register(self, body: LoraBody, caller: Caller) -> Lora | UploadLink:
        """The LoRA; or where its file is to be uploaded, after which it is asked for again.

        A file that is refused is deleted, unless it is a blob that the body names. Raises LoraRefused, by its kind;
        Forbidden for a blob, MissingInput where it is not there; QuotaExceeded; NotSupported; StoreUnavailable.
        """
        if (body.size_bytes or 0) > self.settings.file_bytes:
            raise LoraTooLarge(f"size_bytes: more than {self.settings.file_bytes} (loras.file_bytes)")
        if body.blob is not None:
            return await self._register_blob(body, body.blob, caller)
        lora_id = _id(body, str(body.sha256), caller)
        path = f"models/{lora_id}/lora.safetensors"
        if (stored := await self._stored(lora_id)) is not None:
            return stored
        try:
            info = await self._blobs.head(path)
        except BlobNotFound:
            info = None
        await self._check_quota(caller)
        if info is None or info.size != body.size_bytes:
            return await self._blobs.upload_link(path, size=int(body.size_bytes or 0), expires_s=UPLOAD_S)
        try:
            return await self._checked(body, info, caller)
        except LoraRefused:
            await self._blobs.delete(path)
            raise

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
        paths = [info.path for folder in folders for info in [one async for one in self._blobs.list(folder)]]
        places = asyncio.Semaphore(_AT_ONCE)

        async def read(path: str) -> Lora | None:
            async with places:
                return await self._read(path)

        found = [lora for lora in await asyncio.gather(*map(read, paths)) if lora is not None and caller.sees(lora)]
        return sorted(found, key=lambda lora: (lora.created_at, lora.id), reverse=True)

    async def delete(self, lora_id: str, caller: Caller) -> None:
        """With the file that was uploaded for it. Jobs that name it and have not ended fail. Raises as `get`."""
        lora = await self.get(lora_id, caller)
        await self._blobs.delete(_record(lora_id))
        if lora.path == f"models/{lora_id}/lora.safetensors":
            await self._blobs.delete(lora.path)

    async def link(self, lora: Lora, expires_s: int) -> str:
        """A signed URL of its file. Raises StoreUnavailable."""
        return await self._blobs.link(lora.path, expires_s=expires_s)

    async def _register_blob(self, body: LoraBody, path: str, caller: Caller) -> Lora:
        if not caller.sees_messages:
            raise Forbidden("blob: the API key does not have the scope jobs", field="blob")
        await self._check_quota(caller)
        try:
            info = await self._blobs.head(path)
        except (BlobNotFound, UnsafePath) as e:
            raise MissingInput(f"blob: {e.message}", field="blob") from e
        if body.size_bytes not in (None, info.size):
            raise LoraChanged(f"size_bytes: the blob has {info.size}", field="size_bytes")
        return await self._checked(body, info, caller)

    async def _checked(self, body: LoraBody, info: BlobInfo, caller: Caller) -> Lora:
        if info.size > self.settings.file_bytes:
            raise LoraTooLarge(f"the file has {info.size} bytes, of {self.settings.file_bytes} (loras.file_bytes)")
        async with self._checking:
            with tempfile.TemporaryDirectory(prefix="lora-") as folder:
                file = Path(folder) / "lora.safetensors"
                await self._blobs.download(info.path, file)
                sha256 = await asyncio.to_thread(verified_sha256, file, body.sha256, info.size)
                facts = await self._checker.check(file, alpha=body.alpha)
        lora = Lora(
            **body.model_dump(include={"name", "version", "trigger_word", "alpha"}),
            id=_id(body, sha256, caller),
            owner=caller.id,
            path=info.path,
            sha256=sha256,
            size_bytes=info.size,
            facts=facts,
            created_at=utc_now(),
        )
        data, record = lora.model_dump_json().encode(), _record(lora.id)
        try:
            await self._blobs.put(record, data, content_type="application/json", if_version="")
        except BlobConflict:
            return await self._read(record) or lora
        return lora

    async def _check_quota(self, caller: Caller) -> None:
        if caller.id:
            folder = f"loras/{_hashed(caller.id)[:_OWNER]}"
            if len([one async for one in self._blobs.list(folder)]) >= self.settings.per_key:
                raise QuotaExceeded(f"this key has {self.settings.per_key} LoRAs, as many as it may: delete some")

    async def _stored(self, lora_id: str) -> Lora | None:
        return await self._read(_record(lora_id)) if len(lora_id) == _OWNER + _REST else None

    async def _read(self, path: str) -> Lora | None:
        try:
            data, _ = await self._blobs.get(path, max_bytes=_RECORD_BYTES)
        except (BlobNotFound, UnsafePath):
            return None
        return Lora.model_validate_json(data)


def verified_sha256(file: Path, expected: str | None, size_bytes: int) -> str:
    """The file's SHA-256. Raises Truncated, or LoraChanged, where the file is not the expected one."""
    if (size := file.stat().st_size) < size_bytes:
        raise Truncated(f"the file has {size} bytes, of {size_bytes}")
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if expected not in (None, sha256):
        raise LoraChanged(f"the file's SHA-256 is {sha256}, not {expected}", sha256=sha256)
    return sha256


def _id(body: LoraBody, sha256: str, caller: Caller) -> str:
    """The same for the same request."""
    what = [sha256, body.blob, body.name, body.version, body.trigger_word, body.alpha]
    return _hashed(caller.id)[:_OWNER] + _hashed(json.dumps(what))[:_REST]


def _record(lora_id: str) -> str:
    return f"loras/{lora_id[:_OWNER]}/{lora_id[_OWNER:]}.json"


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

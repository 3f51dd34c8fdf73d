"""An edit that is asked for over HTTP: its body, and the photo and the mask that come with it."""

import asyncio
import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ..blobs import BlobStore
from ..errors import (
    BlobConflict,
    BlobNotFound,
    FluxFillError,
    ImageTooLarge,
    InvalidImage,
    KeyReused,
    MissingInput,
    Unavailable,
    UnknownVariant,
)
from ..jobs.kinds import PostedBody
from ..parameters import CropStrategy, Id, MaskGrow, Prompt, Strength, Whole
from ..settings import Inference, Limits, Settings
from .images import decode_photo
from .masks import Polarity, decode_mask, encode_mask
from .session import INPUTS, session_path

#: Whose sessions those of uploaded pictures are.
API_USER = "api"
#: Bodies with pictures that one process holds: each has up to twice `limits.image_bytes`, and one at a time is decoded.
AT_ONCE = 8


class Links(Protocol):
    """Pictures that bodies link to."""

    async def fetch(self, link: str, *, field: str, max_bytes: int) -> bytes:
        """Raises LinkRefused, which names `field` and says why, for a link that may not be fetched or does not answer
        with at most `max_bytes` in time."""


class SessionName(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    user_id: Id
    session_id: Id


#: As it came in a form, a link, or a `data:` URI.
Picture = Annotated[
    bytes | str,
    WithJsonSchema({"type": "string", "description": "A data: URI in base64, or an https link; in a form, the file."}),
]


_EXAMPLE: Any = {"type": "inpaint", "session": {"user_id": "u1", "session_id": "s1"}, "steps": 28}


class InpaintBody(PostedBody):
    """An edit of a photo: of a session that is stored already, or of a photo and a mask that come with the request.
    What is left out is as the app has it: see `defaults` of `GET /ready`. `model_id` is a variant."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    type: Literal["inpaint"]
    session: SessionName | None = None
    image: Picture | None = None
    #: Left out where the photo's own transparency shows what is to be painted.
    mask: Picture | None = None
    #: What the mask is where the photo is to be painted; `transparent` is wholly so.
    mask_polarity: Polarity = "white"
    prompt: Prompt | None = None
    #: Left out, or -1: one that the answer tells.
    seed: Annotated[Whole, Field(ge=-1, le=2**63 - 1)] | None = None
    crop_strategy: CropStrategy | None = None
    #: Below 1, painting starts from a filled hole instead of noise alone, and only so much of the steps is done.
    strength: Strength | None = None
    #: How far the mask grows before it is painted, as a share of the photo's longest side.
    mask_grow: MaskGrow | None = None
    #: In PNG and WebP, which are lossless, all that is not painted is the photo's, bit by bit.
    format: Literal["png", "jpg", "jpeg", "webp"] = "jpg"

    @model_validator(mode="after")
    def _one_source(self) -> "InpaintBody":
        pictures = (self.image is not None, self.mask is not None or self.mask_polarity == "transparent")
        if any(pictures) if self.session else not all(pictures):
            raise ValueError("give either session, or image and mask")
        return self

    def explicit(self) -> dict[str, Any]:
        """What it gives of an edit's parameters, by their names."""
        given = {
            "guidance_scale": self.guidance,
            **self.model_dump(include={"prompt", "steps", "crop_strategy", "strength", "mask_grow"}),
        }
        given["format"] = "jpg" if self.format == "jpeg" else self.format
        return {name: value for name, value in given.items() if value is not None}


def served_variant(body: InpaintBody, settings: Settings, defaults: Inference) -> str:
    """The one that `body` asks for. Raises UnknownVariant."""
    variant = body.model_id or defaults.variant
    if variant not in settings.variants:
        known = ", ".join(settings.variants)
        raise UnknownVariant(f"model_id: {variant} edits no photos here; there are {known}", field="model_id")
    return variant


class Sessions:
    """Where the photo and the mask of an edit are."""

    def __init__(self, blobs: BlobStore, links: Links, limits: Limits) -> None:
        self._blobs, self._links, self._limits = blobs, links, limits
        self._held = 0
        self._decoding = asyncio.Lock()

    async def of(self, body: InpaintBody, job_id: str) -> SessionName:
        """The session that `body` names; or one of the job's own, in which its pictures, which an edit would take, are
        stored. Storing the same again changes nothing.

        Raises MissingInput for a session without photo or mask; for pictures LinkRefused, what `decode_photo` and
        `decode_mask` raise, and KeyReused where others are stored for this job; Unavailable.
        """
        if body.session is not None:
            if body.session.user_id == API_USER:
                raise MissingInput(f"session: those of {API_USER} are their jobs' own", field="session")
            for name in INPUTS.values():
                path = session_path(body.session.user_id, body.session.session_id, name)
                try:
                    await self._blobs.head(path)
                except BlobNotFound as e:
                    raise MissingInput(f"session: {path} is not in the blob store", path=path) from e
            return body.session
        if self._held >= AT_ONCE:
            raise Unavailable("too many jobs with pictures are being posted; try again", retry_after_s=1)
        self._held += 1
        try:
            await self._store(body, job_id)
        finally:
            self._held -= 1
        return SessionName(user_id=API_USER, session_id=job_id)

    async def _store(self, body: InpaintBody, job_id: str) -> None:
        photo, mask = await asyncio.gather(
            self._bytes("image", body.image), self._bytes("mask", body.image if body.mask is None else body.mask)
        )
        async with self._decoding:
            content_type, mask = await asyncio.to_thread(self._check, photo, mask, body.mask_polarity)
        for role, data, of in (("original", photo, content_type), ("mask", mask, "image/png")):
            path = session_path(API_USER, job_id, INPUTS[role])
            try:
                await self._blobs.put(path, data, content_type=of, if_version="")
            except BlobConflict:
                stored, _ = await self._blobs.get(path, max_bytes=self._limits.image_bytes)
                if stored != data:
                    raise KeyReused("a request with other pictures came with this key or id before") from None

    async def _bytes(self, field: str, given: bytes | str | None) -> bytes:
        assert given is not None, "the body has a session, or both"
        if isinstance(given, bytes):
            return given
        most = self._limits.image_bytes
        head, _, encoded = given.partition(",")
        if not head.lower().startswith("data:"):
            return await self._links.fetch(given, field=field, max_bytes=most)
        if len(encoded) > (most + 2) // 3 * 4:
            raise ImageTooLarge(f"{field}: it has more than {most:,} bytes (limits.image_bytes)")
        try:
            if head.lower().endswith(";base64"):
                return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except ValueError:
            # For what is not ASCII, and its binascii.Error.
            pass
        raise InvalidImage(f"{field}: not data:TYPE;base64, and base64")

    def _check(self, photo: bytes, mask: bytes, polarity: Polarity) -> tuple[str, bytes]:
        """The photo's content type, and the mask, white where the photo is to be painted."""
        with _of("image"):
            decoded = decode_photo(photo, self._limits)
        with _of("mask"):
            pixels = decode_mask(mask, self._limits, decoded.size, polarity)
        return decoded.content_type, mask if polarity == "white" else encode_mask(pixels)


@contextmanager
def _of(field: str) -> Iterator[None]:
    """Errors name the field at fault."""
    try:
        yield
    except FluxFillError as e:
        e.details["field"] = field
        raise

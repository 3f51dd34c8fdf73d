"""The session that is audited: its photo and mask, cut as the app cuts them, and a request for each cell."""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from ..blobs import BlobStore
from ..edit import images, masks, paste, windows
from ..edit.images import Photo
from ..edit.job import encode_within
from ..edit.session import INPUTS, read_input, session_path
from ..errors import FluxFillError, InvalidImage
from ..models import EditRequest, Pixels, PromptEncoder
from ..parameters import AuditRequest, Cell, CropStrategy, Matrix
from ..settings import Settings

log = logging.getLogger(__name__)

#: By variant and prompt; an error where the prompt could not be encoded: its cells fail, and no others.
Embeddings = Mapping[tuple[str, str], bytes | FluxFillError | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What a crop strategy and a growth of the mask make of the session; arrays as in `paste.cut`."""

    plan: windows.Plan
    canvas: Pixels
    mask: Pixels
    #: `[height, width]` of the photo.
    grown: Pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    photo: Photo
    #: As it was drawn, `[height, width]` of the photo.
    mask: Pixels
    #: By crop strategy and `Cell.mask_grow`.
    cuts: Mapping[tuple[CropStrategy, float], Cut]
    embeddings: Embeddings
    feather_px: int
    #: SHA-256 of both files.
    digest: str

    def request(self, job_id: str, cell: Cell) -> EditRequest:
        """Raises what encoding the cell's prompt raised."""
        embeddings = self.embeddings[cell.variant, cell.prompt]
        if isinstance(embeddings, FluxFillError):
            raise embeddings
        cut = self.cut(cell)
        return EditRequest(
            job_id=job_id,
            canvas=cut.canvas,
            mask=cut.mask,
            windows=cut.plan.windows,
            steps=cell.steps,
            guidance_scale=cell.guidance_scale,
            seed=cell.seed,
            embeddings=embeddings,
        )

    def cut(self, cell: Cell) -> Cut:
        return self.cuts[cell.crop, cell.mask_grow]

    def picture(self, canvas: Pixels, cell: Cell) -> Pixels:
        """The photo with the painted canvas in it."""
        cut = self.cut(cell)
        return paste.paste(self.photo.pixels, canvas, cut.grown, cut.plan, self.feather_px)


async def read_session(
    request: AuditRequest, *, blobs: BlobStore, prompts: PromptEncoder, settings: Settings
) -> Session:
    """Raises MissingInput; InvalidImage, also where the mask is empty; ImageTooLarge, MaskMismatch; StoreUnavailable.
    Prompts are encoded here, before any GPU is asked for."""
    ids = request.user_id, request.session_id
    original, mask = [(await read_input(blobs, *ids, role, settings.limits))[0] for role in ("original", "mask")]
    photo, pixels, cuts = await asyncio.to_thread(_prepare, original, mask, request, settings)
    embeddings = await _embeddings(request.matrix, prompts, settings)
    feather_px = settings.windows.feather_px
    digest = hashlib.sha256(hashlib.sha256(original).digest() + hashlib.sha256(mask).digest()).hexdigest()
    return Session(photo=photo, mask=pixels, cuts=cuts, embeddings=embeddings, feather_px=feather_px, digest=digest)


def _prepare(
    original: bytes, mask_bytes: bytes, request: AuditRequest, settings: Settings
) -> tuple[Photo, Pixels, dict[tuple[CropStrategy, float], Cut]]:
    photo = images.decode_photo(original, settings.limits)
    mask = masks.decode_mask(mask_bytes, settings.limits, photo.size)
    # The same windows for all variants, whose pictures are compared.
    reference = settings.variant(request.reference_variant)
    cuts = {}
    for mask_grow in request.matrix.mask_grows:
        grown_px = paste.growth_px(mask, mask_grow)
        grown = paste.grow(mask, grown_px)
        for crop in request.matrix.crops:
            plan = windows.plan(
                grown,
                crop,
                settings.windows,
                grown_px=grown_px,
                text_tokens=reference.max_prompt_tokens,
                family=reference.family,
            )
            if plan is None:
                path = session_path(request.user_id, request.session_id, INPUTS["mask"])
                raise InvalidImage(f"{path} is empty: there is nothing to paint", path=path)
            canvas, canvas_mask = paste.cut(photo.pixels, grown, plan, settings.windows.feather_px)
            cuts[crop, mask_grow] = Cut(plan=plan, canvas=canvas, mask=canvas_mask, grown=grown)
    return photo, mask, cuts


async def _embeddings(matrix: Matrix, prompts: PromptEncoder, settings: Settings) -> Embeddings:
    """Each prompt is encoded once for all variants of a base model."""
    encoded: dict[tuple[str | None, int, str], bytes | FluxFillError | None] = {}
    found = {}
    for variant in matrix.variants:
        row = settings.variant(variant)
        for prompt in matrix.prompts:
            key = row.base if row.takes_prompt else None, row.max_prompt_tokens, prompt
            if key not in encoded:
                try:
                    encoded[key] = await encode_within(prompts, variant, prompt, settings.work.replica_wait_s)
                except FluxFillError as e:
                    extra = {"action": "audit_prompt_failed", "variant": variant, "code": e.code}
                    log.warning("A prompt could not be encoded for %s: %s", variant, e, extra=extra)
                    encoded[key] = e
            found[variant, prompt] = encoded[key]
    return found

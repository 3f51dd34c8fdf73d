"""Every error that this service raises on purpose, with a stable code, an HTTP status and the fate of its message.

    FluxFillError
    ├── InputError                 the request itself is wrong; trying again changes nothing
    │   ├── MalformedMessage       the message cannot be read: it becomes no job
    │   ├── MissingInput           original or mask is not in the blob store
    │   ├── InvalidImage           not a picture, damaged, or of an unsupported kind
    │   ├── ImageTooLarge          over the limit on bytes, pixels or side
    │   ├── BodyTooLarge           an HTTP body over its limit
    │   ├── BodyTimeout            an HTTP body that was not complete in time
    │   ├── UnsupportedMediaType   an HTTP body that is not JSON
    │   ├── MaskMismatch           the mask's shape does not match the photo's
    │   ├── MaskUnclear            the mask does not say what to edit: no bright pixels, or a photo
    │   ├── CallbackRefused        a callbackUrl that this app may not call
    │   ├── LinkRefused            a link in a request that this app may not fetch, or that leads to no picture
    │   ├── NotSupported           something that clients of other systems may ask for
    │   ├── LoraRefused            a file that is no LoRA which this app can use
    │   │   ├── NotSafetensors     another kind of file, such as a pickle
    │   │   ├── Truncated          cut short, or longer than its header says
    │   │   ├── LoraTooLarge       over the limit on bytes or rank
    │   │   ├── WrongModel         a tensor fits no layer of the model
    │   │   ├── UnsupportedFormat  LoKr, LoHa, DoRA, biases, norms, or a number type other than f16, bf16 and f32
    │   │   ├── NotFinite          a number that is infinite or none
    │   │   └── LoraChanged        the blob is not the one that was registered
    │   ├── KeyReused              an Idempotency-Key, or a job's id, that came with another payload before
    │   └── UnknownVariant         a variant this app does not serve
    ├── PaintError                 painting failed for a reason that may pass: an attempt is used
    │   ├── ReplicaLost            the replica died
    │   ├── GpuLost                the GPU failed for good: its replica is replaced
    │   ├── InferenceTimeout       painting took longer than its limit
    │   ├── OutOfMemory            the device had no memory left
    │   └── BlankImage             a picture of one colour, or of numbers that are none
    ├── Unavailable                an outside system is down: wait, no attempt is used
    │   ├── StoreUnavailable       blob or job store
    │   │   └── StoreDenied        the store answers and refuses: a permission, a retention policy, a full disk
    │   ├── BrokerUnavailable      Pub/Sub
    │   ├── WebhookFailed          a publisher's URL did not accept the call
    │   ├── VariantNotReady        no replica of the variant can take the job now
    │   ├── VariantLoadFailed      the variant's weights did not load; the load is retried in the background
    │   ├── ReplicaTaken           the replica has as many audit cells in flight as it may
    │   └── JobsUnavailable        Ray accepts no jobs
    ├── MessageRefused             the broker refuses what is published, and always will
    ├── AuthError                  the caller may not use this HTTP route
    │   ├── RateLimited            too many requests within a minute
    │   ├── QuotaExceeded          the key has as many jobs as it may
    │   ├── Unauthorized           no credential, or an invalid one
    │   ├── Forbidden              a valid token of another account, or a key without the scope
    │   ├── ForeignHost            a request to a host name that is not this app's
    │   └── ForeignOrigin          a request from a web page of another site
    ├── Interrupted                the job was stopped on purpose
    │   ├── Canceled               a user canceled it
    │   └── DeadlineExceeded       its deadline passed
    ├── ClaimError                 another worker has, or had, the claim
    │   ├── PostInFlight           a request with this Idempotency-Key is being answered
    │   ├── Busy                   a live lease on the job or its session, or the job's backoff
    │   ├── OtherVariant           the stored job has another variant than its message names today
    │   ├── UnknownJob             there is no such job
    │   ├── StaleClaim             a write with an old fencing number
    │   └── IllegalTransition      the state machine has no such edge
    ├── UnknownModel               there is no such model or LoRA, or not for this caller
    ├── BlobError                  a blob store's error
    │   ├── BlobNotFound
    │   ├── BlobTooLarge
    │   ├── BlobConflict           the blob changed since the version that was named
    │   ├── ResultReplaced         a later edit of the session wrote over the job's picture
    │   ├── UnsafePath             a path that is not below the store's root
    │   └── InvalidLink            a signed link that has expired, or that this app did not sign
    ├── WeightsError               loading weights failed
    │   ├── MissingToken           the hub needs HF_TOKEN
    │   ├── GatedRepo              the token's owner has not accepted the licence
    │   ├── UnknownWeights         no such repository, revision or file
    │   └── CorruptWeights         the file exists, but its content is wrong
    ├── AuditError                 an audit cannot be done as asked
    │   ├── UnknownAudit           there is no such run
    │   ├── AuditExists            the run id is taken, and the request is not to resume it
    │   ├── AuditRunning           another audit runs on this app
    │   └── AuditImpossible        no GPU can become free for a variant, or no job can reach the stores
    └── SettingsError              the configuration is wrong
        └── InvalidCredentials     the given credentials are invalid

Each one pickles, because it crosses Ray; tests check that each has a code, a status and a disposition.
"""

from enum import StrEnum
from typing import Any, ClassVar


class Disposition(StrEnum):
    """What the worker does with the message when an attempt raises this error."""

    #: The job has ended: acknowledge.
    ACK = "ack"
    #: The input is at fault: fail the job, copy the message to the dead-letter topic, acknowledge.
    DEAD_LETTER = "dead_letter"
    #: Requeue the job, count the attempt, defer the message with exponential backoff.
    RETRY = "retry"
    #: Defer the message with backoff; no attempt is used.
    WAIT = "wait"


class FluxFillError(Exception):
    """Root of the tree. `message` is one sentence for people; `details` are plain values for programs."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    disposition: ClassVar[Disposition] = Disposition.RETRY

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ drops keyword arguments, and these errors cross processes.
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[FluxFillError], message: str, details: dict[str, Any]) -> FluxFillError:
    return cls(message, **details)


class InputError(FluxFillError):
    code = "invalid_input"
    http_status = 422
    disposition = Disposition.DEAD_LETTER


class MalformedMessage(InputError):
    code = "malformed_message"
    http_status = 400


class MissingInput(InputError):
    code = "missing_input"
    http_status = 404


class InvalidImage(InputError):
    code = "invalid_image"


class ImageTooLarge(InputError):
    code = "image_too_large"
    http_status = 413


class BodyTooLarge(InputError):
    code = "body_too_large"
    http_status = 413


class BodyTimeout(InputError):
    code = "body_timeout"
    http_status = 408


class UnsupportedMediaType(InputError):
    code = "unsupported_media_type"
    http_status = 415


class MaskMismatch(InputError):
    code = "mask_mismatch"


class MaskUnclear(InputError):
    code = "mask_unclear"


class CallbackRefused(InputError):
    code = "callback_refused"


class LinkRefused(InputError):
    code = "link_refused"


class NotSupported(InputError):
    code = "not_supported"


class LoraRefused(InputError):
    code = "lora_refused"


class NotSafetensors(LoraRefused):
    code = "not_safetensors"


class Truncated(LoraRefused):
    code = "truncated"


class LoraTooLarge(LoraRefused):
    code = "too_large"
    http_status = 413


class WrongModel(LoraRefused):
    code = "wrong_model"


class UnsupportedFormat(LoraRefused):
    code = "unsupported_format"


class NotFinite(LoraRefused):
    code = "not_finite"


class LoraChanged(LoraRefused):
    code = "lora_changed"


class KeyReused(InputError):
    code = "key_reused"


class UnknownVariant(InputError):
    code = "unknown_variant"


class PaintError(FluxFillError):
    code = "painting_failed"
    http_status = 503


class ReplicaLost(PaintError):
    code = "replica_lost"


class GpuLost(PaintError):
    code = "gpu_lost"


class InferenceTimeout(PaintError):
    code = "inference_timeout"
    http_status = 504


class OutOfMemory(PaintError):
    code = "out_of_memory"


class BlankImage(PaintError):
    """Its seed would give it again."""

    code = "blank_image"
    disposition = Disposition.DEAD_LETTER


class Unavailable(FluxFillError):
    code = "unavailable"
    http_status = 503
    disposition = Disposition.WAIT


class StoreUnavailable(Unavailable):
    code = "store_unavailable"


class StoreDenied(StoreUnavailable):
    code = "store_denied"


class BrokerUnavailable(Unavailable):
    code = "broker_unavailable"


class WebhookFailed(Unavailable):
    code = "webhook_failed"


class VariantNotReady(Unavailable):
    code = "variant_not_ready"


class VariantLoadFailed(Unavailable):
    code = "variant_failed"


class ReplicaTaken(Unavailable):
    code = "replica_taken"


class JobsUnavailable(Unavailable):
    code = "jobs_unavailable"


class MessageRefused(FluxFillError):
    code = "message_refused"
    http_status = 422
    disposition = Disposition.DEAD_LETTER


class AuthError(FluxFillError):
    code = "not_allowed"
    http_status = 403
    disposition = Disposition.DEAD_LETTER


class RateLimited(AuthError):
    """`details["retry_after_s"]`: when the next request is answered, in seconds."""

    code = "rate_limited"
    http_status = 429


class QuotaExceeded(AuthError):
    """`details["retry_after_s"]`, where waiting is of use within a day."""

    code = "quota_exceeded"
    http_status = 429


class Unauthorized(AuthError):
    code = "unauthorized"
    http_status = 401


class Forbidden(AuthError):
    code = "forbidden"


class ForeignHost(AuthError):
    code = "foreign_host"
    http_status = 421


class ForeignOrigin(AuthError):
    code = "foreign_origin"


class Interrupted(FluxFillError):
    code = "interrupted"
    http_status = 409
    disposition = Disposition.ACK


class Canceled(Interrupted):
    code = "canceled"


class DeadlineExceeded(Interrupted):
    code = "deadline_exceeded"
    http_status = 504


class ClaimError(FluxFillError):
    code = "claim_refused"
    http_status = 409
    disposition = Disposition.WAIT


class PostInFlight(ClaimError):
    code = "post_in_flight"


class Busy(ClaimError):
    """`details["retry_after_s"]`: seconds until the lease in the way can have ended."""

    code = "busy"


class OtherVariant(ClaimError):
    """`details["variant"]`: the one that the job was first claimed with."""

    code = "other_variant"


class UnknownJob(ClaimError):
    code = "unknown_job"
    http_status = 404


class StaleClaim(ClaimError):
    code = "stale_claim"


class IllegalTransition(ClaimError):
    code = "illegal_transition"


class UnknownModel(FluxFillError):
    code = "unknown_model"
    http_status = 404
    disposition = Disposition.DEAD_LETTER


class BlobError(FluxFillError):
    code = "blob_error"


class BlobNotFound(BlobError):
    code = "blob_not_found"
    http_status = 404
    disposition = Disposition.DEAD_LETTER


class BlobTooLarge(BlobError):
    code = "blob_too_large"
    http_status = 413
    disposition = Disposition.DEAD_LETTER


class BlobConflict(BlobError):
    code = "blob_conflict"
    http_status = 409


class ResultReplaced(BlobError):
    code = "result_replaced"
    http_status = 409


class UnsafePath(BlobError):
    code = "unsafe_path"
    http_status = 400
    disposition = Disposition.DEAD_LETTER


class InvalidLink(BlobError):
    code = "invalid_link"
    http_status = 403
    disposition = Disposition.DEAD_LETTER


class WeightsError(FluxFillError):
    code = "weights_error"
    http_status = 503


class MissingToken(WeightsError):
    code = "missing_token"


class GatedRepo(WeightsError):
    code = "gated_repo"


class UnknownWeights(WeightsError):
    code = "unknown_weights"


class CorruptWeights(WeightsError):
    code = "corrupt_weights"


class AuditError(FluxFillError):
    code = "audit_refused"
    http_status = 409
    disposition = Disposition.DEAD_LETTER


class UnknownAudit(AuditError):
    code = "unknown_audit"
    http_status = 404


class AuditExists(AuditError):
    code = "audit_exists"


class AuditRunning(AuditError):
    """`details["run_id"]`: the run that is running."""

    code = "audit_running"


class AuditImpossible(AuditError):
    code = "audit_impossible"


class SettingsError(FluxFillError):
    code = "invalid_settings"


class InvalidCredentials(SettingsError):
    code = "invalid_credentials"
    disposition = Disposition.WAIT

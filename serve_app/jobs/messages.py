"""The wire: what a publisher sends, and the envelope that a push subscription wraps it in."""

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic.alias_generators import to_camel

from ..errors import MalformedMessage
from ..parameters import CropStrategy, GuidanceScale, Id, MaskGrow, Prompt, Steps, Strength, VariantName, Whole

M = TypeVar("M", bound=BaseModel)

#: Of a field's name that a sender made up, in errors and logs.
_NAME_CHARS = 100

#: version-traceid-parentid-flags of https://www.w3.org/TR/trace-context/, version 00; all zeros are no id.
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

#: Attributes of a message, and bytes of an attribute's name and value: Pub/Sub's own limits
#: (https://cloud.google.com/pubsub/quotas#resource_limits).
MAX_ATTRIBUTES = 100

_ATTRIBUTE_BYTES = 256 + 1024

#: Every value in JSON follows one of these. A message's base64 holds none of them, so an envelope has no more than its
#: attributes can hold, and a few of its own; counting them takes milliseconds, parsing a million values seconds.
_SEPARATORS = b",:[{"

_MAX_SEPARATORS = MAX_ATTRIBUTES * _ATTRIBUTE_BYTES + 1_000

#: Attributes that begin with this say why a message was given up. Senders have none.
DEAD_LETTER = "deadLetter"

#: The attribute of a message that the outbox published again: when the first one was.
ASKED_AT = "askedAt"

#: A moment in RFC 3339, section 5.6; pydantic alone also reads dates and Unix seconds.
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _written(value: object) -> object:
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC_3339.fullmatch(value)):
        return value
    raise ValueError("not an RFC 3339 time with a time zone, such as 2030-01-01T00:00:00Z")


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("not between the years 1 and 9999 in UTC") from None


Moment = Annotated[AwareDatetime, BeforeValidator(_written), AfterValidator(_in_utc)]


class EditMessage(BaseModel):
    """The payload of a session message. Field names on the wire are camelCase; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, extra="ignore")

    user_id: Id
    session_id: Id
    variant: VariantName | None = None
    prompt: Prompt | None = None
    guidance_scale: GuidanceScale | None = None
    steps: Steps | None = None
    #: None or -1: derived from the job's id.
    seed: Annotated[Whole, Field(ge=-1, le=2**63 - 1)] | None = None
    crop_strategy: CropStrategy | None = None
    strength: Strength | None = None
    #: See `WindowSettings.mask_grow`.
    mask_grow: MaskGrow | None = None
    #: Painting that has not ended by then is given up.
    deadline: Moment | None = None
    #: Called when the job is over.
    callback_url: AnyHttpUrl | None = None

    def explicit(self) -> dict[str, Any]:
        """The parameters the publisher gave, as plain JSON values: part of the edit's identity."""
        names = {"variant", "prompt", "guidance_scale", "steps", "seed", "crop_strategy", "strength", "mask_grow"}
        given = self.model_dump(mode="json", include=names, exclude_none=True)
        if given.get("seed") == -1:
            del given["seed"]
        return given


class Attributes(BaseModel):
    """Message attributes this service reads. Others are left alone."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, extra="ignore")

    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    #: For Pub/Sub's filters, which sort messages into subscriptions by it; nothing here reads it.
    priority: Annotated[str, StringConstraints(max_length=64)] | None = None
    #: See `traceparent_of`.
    traceparent: str = ""
    #: See ASKED_AT.
    asked_at: Moment | None = None
    #: Which kind of job the message asks for; None: an edit.
    job_type: Annotated[str, StringConstraints(max_length=64)] | None = None
    #: A job that was posted, and its variant: the message says no more.
    job_id: Id | None = None
    variant: VariantName | None = None


class _PushMessage(BaseModel):
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, extra="ignore")

    #: In protobuf's JSON, null is a field that was left out.
    data: str | None = None
    attributes: Annotated[dict[str, str], Field(max_length=MAX_ATTRIBUTES)] | None = None
    message_id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    publish_time: Moment | None = None


#: The alphabet of URLs (RFC 4648, section 5) in that of section 4.
_STANDARD_BASE64 = str.maketrans("-_", "+/")


class PushEnvelope(BaseModel):
    """What Pub/Sub posts to a push endpoint, in its wrapped form."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, extra="ignore")

    message: _PushMessage

    def payload(self) -> bytes:
        """The decoded message data. As in protobuf's JSON, either base64 alphabet is read, with or without padding.

        Raises MalformedMessage where it is not base64.
        """
        text = (self.message.data or "").translate(_STANDARD_BASE64)
        if "=" not in text:
            text += "=" * (-len(text) % 4)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as e:
            raise MalformedMessage(f"message.data: not base64: {e}", field="message.data") from e


def parse_edit(data: bytes, *, max_bytes: int) -> tuple[EditMessage, list[str]]:
    """The message in `data`, and the first few names of unknown fields.

    Raises MalformedMessage, which names the first field at fault.
    """
    if len(data) > max_bytes:
        raise MalformedMessage(f"the message has {len(data)} bytes; at most {max_bytes} are read", field="")
    message = _validate(EditMessage, data)
    known = {to_camel(name) for name in EditMessage.model_fields}
    raw = _RawObject.model_validate_json(data)
    return message, [name[:_NAME_CHARS] for name in sorted(set(raw.model_extra or {}) - known)[:20]]


def parse_attributes(attributes: Mapping[str, str]) -> Attributes:
    """Raises MalformedMessage, which names the attribute at fault."""
    try:
        return Attributes.model_validate({**attributes, "traceparent": traceparent_of(attributes)})
    except ValidationError as e:
        raise _malformed(e, "attributes.") from e


def traceparent_of(attributes: Mapping[str, str]) -> str:
    """A message's W3C trace context: the publisher's own, or that of Google's client libraries. What is none is
    ignored, as the standard has it."""
    found = (attributes.get(name, "") for name in ("traceparent", "googclient_traceparent"))
    return next((value for value in found if TRACEPARENT.fullmatch(value)), "")


def parse_envelope(body: bytes) -> PushEnvelope:
    """The push envelope in `body`.

    Raises MalformedMessage, which names the first field at fault.
    """
    if len(body) - len(body.translate(None, _SEPARATORS)) > _MAX_SEPARATORS:
        raise MalformedMessage("the body has more values than a message of Pub/Sub can have", field="")
    return _validate(PushEnvelope, body)


def without_reasons(attributes: Mapping[str, str]) -> dict[str, str]:
    """A message's attributes as its sender gave them."""
    return {n: value for n, value in attributes.items() if not n.startswith(DEAD_LETTER) and n != ASKED_AT}


class _RawObject(BaseModel):
    model_config = ConfigDict(extra="allow")


def _validate(model: type[M], data: bytes) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as e:
        raise _malformed(e, "") from e


def _malformed(e: ValidationError, prefix: str) -> MalformedMessage:
    # include_input would copy the sender's words, a prompt or worse, into logs.
    problems = e.errors(include_url=False, include_input=False, include_context=False)
    first = problems[0]
    field = (prefix + ".".join(str(part) for part in first["loc"]))[:_NAME_CHARS]
    where = field or "the message"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    what = first["msg"].removeprefix("Value error, ")
    return MalformedMessage(f"{where}: {what}{more}", field=field)

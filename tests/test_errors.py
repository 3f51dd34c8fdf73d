"""Every error of the tree crosses process borders whole, and has a code, a status and a disposition."""

import pickle
import re

import pytest

from serve_app import errors
from serve_app.errors import Disposition, FluxFillError


def tree(cls: type[FluxFillError] = FluxFillError, depth: int = 0) -> list[tuple[int, type[FluxFillError]]]:
    # Ray makes subclasses of its own of every error that has crossed it.
    ours = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return [(depth, cls), *(entry for sub in ours for entry in tree(sub, depth + 1))]


CLASSES = [cls for _, cls in tree()]

#: What becomes of the message, class by class: changing a row changes what users see.
DISPOSITIONS = {
    Disposition.ACK: ["Interrupted", "Canceled", "DeadlineExceeded"],
    Disposition.WAIT: [
        "Unavailable", "StoreUnavailable", "BrokerUnavailable", "WebhookFailed", "VariantNotReady", "ClaimError",
        "Busy", "InvalidCredentials", "UnknownJob", "StaleClaim", "IllegalTransition", "ReplicaTaken",
        "JobsUnavailable", "VariantLoadFailed", "StoreDenied", "OtherVariant", "PostInFlight",
    ],
    Disposition.DEAD_LETTER: [
        "InputError", "MalformedMessage", "MissingInput", "InvalidImage", "ImageTooLarge", "BodyTooLarge",
        "BodyTimeout", "UnsupportedMediaType", "ForeignHost", "ForeignOrigin",
        "MaskMismatch", "MaskUnclear", "CallbackRefused", "UnknownVariant", "MessageRefused", "BlobNotFound",
        "BlobTooLarge", "UnsafePath", "InvalidLink", "AuthError", "Unauthorized", "Forbidden", "AuditError",
        "UnknownAudit", "AuditExists", "AuditRunning", "AuditImpossible", "LinkRefused", "KeyReused", "NotSupported",
        "BlankImage", "RateLimited", "QuotaExceeded", "LoraRefused", "NotSafetensors", "Truncated", "LoraTooLarge",
        "WrongModel", "UnsupportedFormat", "NotFinite", "LoraChanged", "UnknownModel",
    ],
    Disposition.RETRY: [
        "FluxFillError", "PaintError", "ReplicaLost", "GpuLost", "InferenceTimeout", "OutOfMemory",
        "BlobError", "BlobConflict", "ResultReplaced", "WeightsError", "MissingToken", "GatedRepo", "UnknownWeights",
        "CorruptWeights", "SettingsError",
    ],
}  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_it_pickles_with_message_and_details(cls: type[FluxFillError]) -> None:
    error = cls("what went wrong", path="a/b", retry_after_s=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (copy.message, copy.details, str(copy)) == (error.message, error.details, "what went wrong")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_it_has_a_code_a_status_and_a_disposition(cls: type[FluxFillError]) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code)
    assert "code" in vars(cls), "a code of its own, not its parent's"
    assert 400 <= cls.http_status <= 599
    assert cls.__name__ in DISPOSITIONS[cls.disposition]


def test_codes_are_unique() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"^    ((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    assert [(len(indent) // 4, name) for indent, name in drawn] == [(depth, cls.__name__) for depth, cls in tree()]

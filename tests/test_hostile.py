"""Whatever strangers send ends as what it says or in an error of ours, and takes no more memory than it may."""

import base64
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from serve_app.edit.images import decode_photo
from serve_app.edit.job import edit_job_id
from serve_app.errors import MalformedMessage
from serve_app.jobs.messages import parse_attributes, parse_edit, parse_envelope
from serve_app.settings import Limits

from .hostile_pictures import encoded
from .pictures import noise

MESSAGE: Mapping[str, Any] = {
    "userId": "u1",
    "sessionId": "s1",
    "variant": "telea",
    "prompt": "grass",
    "guidanceScale": 30,
    "steps": 4,
    "seed": 7,
    "cropStrategy": "auto",
    "deadline": "2030-01-01T00:00:00Z",
    "callbackUrl": "https://example.org/done",
}
ATTRIBUTES = {"idempotencyKey": "k", "priority": "high", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
LIMITS = Limits()


def push(data: bytes = b"{}", **message: Any) -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    inner = {"data": text, "attributes": ATTRIBUTES, "messageId": "7", "publishTime": "2030-01-01T00:00:00Z"}
    return {"message": {**inner, **message}, "subscription": "s", "deliveryAttempt": 1}


class Gate:
    """Where messages come in: counts how they end, and lets nothing through that is neither read nor refused."""

    def __init__(self) -> None:
        self.taken = 0
        self.ended = Counter[str]()

    def take(self, body: bytes) -> None:
        """As a push, and as the payload of one that was pulled."""
        self.taken += 1
        for read in (self._push, self._payload):
            try:
                read(body)
            except MalformedMessage as e:
                self._note_refusal(e)
            else:
                self.ended["read"] += 1

    def _push(self, body: bytes) -> None:
        envelope = parse_envelope(body)
        json.dumps(envelope.model_dump(mode="json")).encode()
        parse_attributes(envelope.message.attributes or {})
        self._payload(envelope.payload())

    def _payload(self, data: bytes) -> None:
        message, unknown = parse_edit(data, max_bytes=LIMITS.message_bytes)
        # What was read can be used: stored, compared, hashed, logged.
        edit_job_id(message, versions=["1", "2"], idempotency_key=None)
        json.dumps(message.model_dump(mode="json"), ensure_ascii=False).encode()
        assert len(", ".join(unknown).encode()) < 10_000
        if message.deadline is not None:
            message.deadline.astimezone(UTC)

    def take_attributes(self, attributes: Mapping[str, str]) -> None:
        self.taken += 1
        try:
            json.dumps(parse_attributes(attributes).model_dump(), ensure_ascii=False).encode()
        except MalformedMessage as e:
            self._note_refusal(e)
        else:
            self.ended["read"] += 1

    def _note_refusal(self, e: MalformedMessage) -> None:
        assert isinstance(e.details["field"], str)
        assert len(e.message) < 1_000, "an error is no place for what a stranger wrote"
        e.message.encode()
        self.ended["refused"] += 1


#: As they stand in JSON, which json.dumps would not write.
RAW = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "1" * 5_000, "-" + "9" * 400, "0.1e-99999", "1e5", "01"),
    *('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"a\\u0000b"', '"..\\/.."', '"%2e%2e%2f"', '"\\x"', '"', "'a'"),
    *("[" * 5_000, "[" * 500 + "]" * 500, '{"a":' * 5_000, '{"a":' * 300 + "1" + "}" * 300, "{}", "[]", "[[]]", ""),
    *("null", "true", '"0001-01-01T00:00:00+23:59"', '"9999-12-31T23:59:59-23:59"', '"99999-01-01T00:00:00Z"'),
    *('"2030-01-01"', "253402300800", "-1e12", '"2030-02-30T00:00:00Z"', '"https://"', '"http://[::"', '"https://a:99999"'),
    *('"https://u:p@h/"', '"https://xn--/"', '"javascript:alert(1)"', '"https://\\u2028/"', f'"{"x" * 10_000}"'),
    *(f'"{"é" * 2_000}"', '"========"', '"YQ"', '"a\\nb"', '"\\uff0e\\uff0e"', '"AAAA' + "A" * 9_000 + '"'),
    *(f'{{"{"k" * 10_000}":1}}', "{" + ",".join(f'"k{i}":1' for i in range(5_000)) + "}"),
]  # fmt: skip

texts = st.text(max_size=20) | st.text(st.sampled_from("./\\\0\n%\u202e\ud800é"), max_size=10)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=9).map(repr),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
hostile = st.sampled_from(RAW) | values.map(json.dumps)


def with_each_field_replaced(fields: Mapping[str, Any], name: str, value: str) -> Iterator[str]:
    """The JSON object with `value` in the place of one field after the other, then under `name`, and then once more
    under a name that is there already."""
    for field in [*fields, name]:
        others = "".join(f"{json.dumps(key)}:{json.dumps(other)}," for key, other in fields.items() if key != field)
        yield f"{{{others}{json.dumps(field)}:{value}}}"
    yield json.dumps(fields)[:-1] + f",{json.dumps(next(iter(fields)))}:{value}}}"


def hostile_payloads(name: str, value: str) -> list[bytes]:
    return [text.encode() for text in with_each_field_replaced(MESSAGE, name, value)]


def hostile_envelopes(name: str, value: str) -> list[bytes]:
    inner = (f'{{"message":{text}}}' for text in with_each_field_replaced(push()["message"], name, value))
    return [text.encode() for text in [*inner, *with_each_field_replaced(push(), name, value)]]


def pushes_of_hostile_payloads(name: str, value: str) -> list[bytes]:
    return [json.dumps(push(payload)).encode() for payload in [value.encode(), *hostile_payloads(name, value)]]


def damaged(good: bytes, damage: list[tuple[int, int, bytes]]) -> list[bytes]:
    bodies = [good]
    for at, removed, inserted in damage:
        bodies.append(bodies[-1][:at] + inserted + bodies[-1][at + removed :])
    return bodies[1:]


goods = st.sampled_from([json.dumps(body).encode() for body in (MESSAGE, push(json.dumps(MESSAGE).encode()))])
places = st.tuples(st.integers(0, 600), st.integers(0, 3), st.binary(max_size=3))
#: What draws several bodies at once, and how often it is asked to.
BODIES: list[tuple[st.SearchStrategy[list[bytes]], int]] = [
    (st.builds(hostile_payloads, texts, hostile), 300),
    (st.builds(hostile_envelopes, texts, hostile), 300),
    (st.builds(pushes_of_hostile_payloads, texts, hostile), 300),
    (st.builds(damaged, goods, st.lists(places, min_size=1, max_size=4)), 500),
    (st.lists(st.binary(max_size=300) | values.map(json.dumps).map(str.encode), min_size=1, max_size=3), 300),
]
#: For Pub/Sub delivers attributes apart from the payload.
attributes = st.dictionaries(st.sampled_from([*ATTRIBUTES, "x"]) | texts, texts | st.just("x" * 10_000), max_size=4)

EXAMPLES = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
def test_ten_thousand_messages_are_read_or_refused() -> None:
    gate = Gate()
    for value in RAW:
        for placed in (hostile_payloads, hostile_envelopes, pushes_of_hostile_payloads):
            for body in [value.encode(), *placed("x" * 10_000, value)]:
                gate.take(body)
    for bodies, times in BODIES:

        @settings(EXAMPLES, max_examples=times)
        @given(bodies)
        def take(bodies: list[bytes]) -> None:
            for body in bodies:
                gate.take(body)

        take()
    settings(EXAMPLES, max_examples=500)(given(attributes)(gate.take_attributes))()
    assert gate.taken >= 10_000
    assert min(gate.ended["read"], gate.ended["refused"]) > 500, "or one of both was not tried"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory is read from /proc")
def test_two_thousand_hostile_pictures_end_well_in_little_memory(tmp_path: Path) -> None:
    # Made and decoded in two processes: only the second one's memory counts.
    made = subprocess.run(
        [sys.executable, "-m", "tests.hostile_pictures", "write", tmp_path], stdout=subprocess.PIPE, check=True
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_pictures", "decode", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} ended the process: {done.stderr[-2000:]}"
    result = json.loads(lines[-1])
    assert len(lines) - 1 == int(made.stdout) >= 2_000
    assert result["untyped"] == []
    assert sum(result["outcomes"].values()) == 2 * int(made.stdout)
    assert {"decoded", "invalid_image", "image_too_large", "mask_mismatch", "mask_unclear"} == result["outcomes"].keys()
    assert result["grown_bytes"] < 1_000_000_000, result["largest"]


def test_transparency_is_flattened_alike_in_every_strip() -> None:
    colours, alpha = noise(20, 600), np.tile(np.arange(600) % 256, (20, 1)).T.astype(np.uint8)
    data = encoded(Image.fromarray(np.dstack([colours, alpha])), "PNG")
    share = alpha[..., None] / 255
    expected = colours * share + 255 * (1 - share)
    assert np.abs(decode_photo(data, LIMITS).pixels - expected).max() <= 1


#: Bodies of the most bytes that a push may have, each of a shape that costs a parser memory.
LARGEST = """
import json
from pathlib import Path
from serve_app.http.app import MAX_ENVELOPE_BYTES
from serve_app.errors import MalformedMessage
from serve_app.jobs.messages import parse_attributes, parse_edit, parse_envelope

def peak_mb():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

room = MAX_ENVELOPE_BYTES - 200
bodies = {
    "numbers": b'{"message":{"messageId":"1","data":[' + b"1," * (room // 2) + b"1]}}",
    "names": b'{"message":{"messageId":"1","attributes":{'
    + b",".join(b'"%07d":"x"' % i for i in range(room // 14))
    + b"}}}",
    "unknown": b"{" + b",".join(b'"%07d":[]' % i for i in range(room // 13)) + b"}",
    "depth": b"[" * room,
    "text": b'{"message":{"messageId":"1","data":"' + b"A" * room + b'"}}',
    "escapes": b'{"message":{"messageId":"1","data":"' + b"\\u0041" * (room // 6) + b'"}}',
}
before = peak_mb()
ended = {}
for name, body in bodies.items():
    assert len(body) <= MAX_ENVELOPE_BYTES, name
    try:
        envelope = parse_envelope(body)
        parse_attributes(envelope.message.attributes or {})
        parse_edit(envelope.payload(), max_bytes=64_000)
        ended[name] = "read"
    except MalformedMessage:
        ended[name] = "refused"
print(json.dumps({"ended": ended, "growth_mb": peak_mb() - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is read from /proc")
def test_the_largest_messages_cost_less_than_a_gigabyte() -> None:
    done = subprocess.run([sys.executable, "-c", LARGEST], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert set(told["ended"].values()) == {"refused"} and len(told["ended"]) == 6
    assert told["growth_mb"] < 1000, told

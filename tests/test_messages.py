"""What is read from the wire, and how clearly the rest is refused."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import MalformedMessage
from serve_app.jobs.messages import (
    MAX_ATTRIBUTES,
    EditMessage,
    parse_attributes,
    parse_edit,
    parse_envelope,
    without_reasons,
)
from serve_app.parameters import CropStrategy

REQUIRED = {"userId": "u-1", "sessionId": "S_2"}


def parse(fields: dict[str, Any] | str | bytes, max_bytes: int = 64_000) -> tuple[EditMessage, list[str]]:
    data = fields if isinstance(fields, bytes) else (fields if isinstance(fields, str) else json.dumps(fields)).encode()
    return parse_edit(data, max_bytes=max_bytes)


def refused(fields: dict[str, Any] | str | bytes, **limits: int) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        parse(fields, **limits)
    return caught.value


def test_the_smallest_message() -> None:
    message, unknown = parse(REQUIRED)
    assert (message.user_id, message.session_id, message.explicit(), unknown) == ("u-1", "S_2", {}, [])


def test_everything_a_message_may_say() -> None:
    message, unknown = parse(
        {
            **REQUIRED,
            "variant": "tiny-Q4_0",
            "prompt": "grass",
            "guidanceScale": 10,
            "steps": 100,
            "seed": 2**63 - 1,
            "cropStrategy": "resize",
            "strength": 0.8,
            "maskGrow": 0,
            "deadline": "2030-01-01T00:00:00+02:00",
            "callbackUrl": "https://example.org/done",
        }
    )
    assert unknown == []
    assert message.crop_strategy is CropStrategy.RESIZE and message.guidance_scale == 10.0
    assert message.deadline and message.deadline.utcoffset() is not None
    assert message.explicit() == {
        "variant": "tiny-Q4_0",
        "prompt": "grass",
        "guidance_scale": 10.0,
        "steps": 100,
        "seed": 2**63 - 1,
        "crop_strategy": "resize",
        "strength": 0.8,
        "mask_grow": 0,
    }


def test_unknown_fields_are_named_and_ignored() -> None:
    message, unknown = parse({**REQUIRED, "zoom": 2, "_x": {"deep": []}, "user_id": "snake"})
    assert message == parse(REQUIRED)[0]
    assert unknown == ["_x", "user_id", "zoom"]


@pytest.mark.parametrize("field", ["userId", "sessionId"])
@pytest.mark.parametrize(
    "value",
    [
        *(
            "",
            "..",
            ".",
            "a/b",
            "../x",
            "a\\b",
            "a\x00",
            "a\n",
            "\n",
            " a",
            "a b",
            "é",
            "\uff11",
            "٣",
            "a" * 129,
            "x" * 10_000,
        ),
        *(1, 1.5, None, True, [], {}),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_ids_that_could_escape_a_path_are_refused(field: str, value: object) -> None:
    error = refused({**REQUIRED, field: value})
    assert error.details["field"] == field and field in error.message


@pytest.mark.parametrize("field", ["userId", "sessionId"])
def test_ids_are_required(field: str) -> None:
    error = refused({name: value for name, value in REQUIRED.items() if name != field})
    assert error.details["field"] == field


WRONG: list[tuple[str, list[object]]] = [
    ("variant", ["", "a/b", "x" * 65, 1]),
    ("prompt", ["x" * 2001, 1, []]),
    ("guidanceScale", [-0.1, 100.1, "10", True, []]),
    ("steps", [0, 101, -1, 1.5, 28.5, 100.5, 1e300, "28", "28.0", True, []]),
    ("seed", [-2, -2.0, 2**63, 2.0**63, 1.5, "1", False]),
    ("cropStrategy", ["zoom", "AUTO", 1, ""]),
    ("strength", [0, 0.009, 1.01, -1, "0.5", True]),
    ("maskGrow", [-0.001, 0.051, "0.01", True, []]),
    ("deadline", ["2030-01-01T00:00:00", "soon", [], "2030-13-01T00:00:00Z", "2030-01-01", "20300101", "1893456000"]),
    ("deadline", [1893456000, 1893456000.5, True, "", "2030-01-01T00:00Z", "2030-01-01T00:00:00+02", "12:00:00Z"]),
    (
        "deadline",
        ["2030-01-01T00:00:00+2400", " 2030-01-01T00:00:00Z", "2030-01-01T00:00:00Z\n", "P1D", "٢٠٣٠-01-01T00:00:00Z"],
    ),
    ("callbackUrl", ["ftp://x.org", "x.org", "", 1]),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG for value in values],
    ids=lambda value: repr(value)[:16],
)
def test_every_field_is_checked_and_named(field: str, value: object) -> None:
    error = refused({**REQUIRED, field: value})
    assert "Value error" not in error.message
    assert error.details["field"] == field and error.message.startswith(f"{field}: ")


@pytest.mark.parametrize(("field", "name"), [("steps", "steps"), ("seed", "seed")])
@pytest.mark.parametrize("written", ["7", "7.0", "7.000", "7e0", "0.7e1"])
def test_a_whole_number_is_read_however_it_is_written(field: str, name: str, written: str) -> None:
    explicit = parse(f'{{"userId":"u","sessionId":"s","{field}":{written}}}')[0].explicit()
    assert explicit == {name: 7} and type(explicit[name]) is int


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2030-01-01T00:00:00Z", datetime(2030, 1, 1)),
        ("2030-01-01t00:00:00z", datetime(2030, 1, 1)),
        ("2030-01-01 00:00:00Z", datetime(2030, 1, 1)),
        ("2030-01-01T00:00:00-00:00", datetime(2030, 1, 1)),
        ("2030-01-01T00:00:00+02:00", datetime(2029, 12, 31, 22)),
        ("2030-01-01T00:00:00.5-23:59", datetime(2030, 1, 1, 23, 59, 0, 500_000)),
        ("2030-01-01T00:00:00.123456789Z", datetime(2030, 1, 1, 0, 0, 0, 123_456)),
    ],
)
def test_a_deadline_is_a_moment_in_rfc_3339(written: str, read: datetime) -> None:
    assert parse({**REQUIRED, "deadline": written})[0].deadline == read.replace(tzinfo=UTC)


@pytest.mark.parametrize("field", [name for name, _ in WRONG])
def test_null_is_a_field_left_out(field: str) -> None:
    assert parse({**REQUIRED, field: None}) == parse(REQUIRED)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    assert refused(f'{{"userId":"u","sessionId":"s","guidanceScale":{number}}}').details["field"] == "guidanceScale"


def test_the_limits_themselves_are_taken() -> None:
    message, _ = parse(
        {**REQUIRED, "userId": "a" * 128, "prompt": "ü" * 2000, "guidanceScale": 0, "steps": 1, "seed": -1}
    )
    assert message.steps == 1 and message.explicit()["guidance_scale"] == 0


def test_what_is_at_fault_is_not_repeated() -> None:
    assert "my secret prompt" not in refused({**REQUIRED, "prompt": "my secret prompt" * 1000}).message


def test_several_faults_are_counted() -> None:
    assert "(and 2 more)" in refused({"userId": "..", "sessionId": "..", "steps": 0}).message


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"\xef\xbb\xbf" + json.dumps(REQUIRED).encode(),
            b"null",
            b"[]",
            b'"text"',
            b"1",
            b"{",
            b"\xff\xfe",
            b'{"userId": "\\ud800", "sessionId": "s"}',
            b"{}{}",
        ),
        *(b"[" * 50_000, b'{"userId":' * 10_000),
        b'{"userId":"u","sessionId":"s","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    refused(data, max_bytes=1_000_000)


def test_the_last_of_two_fields_of_one_name_counts() -> None:
    assert parse('{"userId":"a","sessionId":"s","userId":"b"}')[0].user_id == "b"
    assert refused('{"userId":"a","sessionId":"s","userId":".."}').details["field"] == "userId"


def test_a_message_has_a_longest_size() -> None:
    size = len(json.dumps(REQUIRED))
    parse(REQUIRED, max_bytes=size)
    assert f"{size} bytes" in refused(REQUIRED, max_bytes=size - 1).message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        message, _ = parse(data)
    except MalformedMessage:
        return
    assert "/" not in message.user_id + message.session_id


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*REQUIRED, "seed", "steps", "prompt", "deadline", "callbackUrl"]), json_values))
def test_any_json_is_a_message_or_refused_with_a_field(fields: dict[str, Any]) -> None:
    try:
        parse(fields)
    except MalformedMessage as e:
        assert isinstance(e.details["field"], str)


# Attributes


def test_attributes() -> None:
    attributes = parse_attributes({"idempotencyKey": "k", "other": "x"})
    assert (attributes.idempotency_key, attributes.traceparent, attributes.priority) == ("k", "", None)
    assert parse_attributes({}).idempotency_key is None


TRACE = f"00-{'a1' * 16}-{'b2' * 8}-01"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00-1",
        TRACE.upper(),
        f"01{TRACE[2:]}",
        f"{TRACE}-x",
        f"00-{'0' * 32}-{'b2' * 8}-01",
        "x" * 10_000,
        f"{TRACE}\n",
    ],
)
def test_what_is_no_trace_context_is_ignored(value: str) -> None:
    assert parse_attributes({"traceparent": value}).traceparent == ""
    assert parse_attributes({"traceparent": TRACE}).traceparent == TRACE


@pytest.mark.parametrize("value", ["", "k" * 257])
def test_a_bad_attribute_is_named(value: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        parse_attributes({"idempotencyKey": value})
    assert caught.value.details["field"] == "attributes.idempotencyKey"


def test_a_senders_attributes_give_no_reasons() -> None:
    sent = {"priority": "high", "deadletter": "x", "deadLetterTruncated": "true", "deadLetterJobId": "edit-1"}
    assert without_reasons(sent) == {"priority": "high", "deadletter": "x"}


# Envelopes


def envelope(**message: object) -> bytes:
    data = base64.b64encode(json.dumps(REQUIRED).encode()).decode()
    return json.dumps({"message": {"data": data, "messageId": "7", **message}, "subscription": "x"}).encode()


def test_an_envelope() -> None:
    parsed = parse_envelope(envelope(attributes={"a": "b"}, publishTime="2030-01-01T00:00:00.123Z", orderingKey=""))
    assert parse(parsed.payload())[0].user_id == "u-1"
    assert (parsed.message.message_id, parsed.message.attributes) == ("7", {"a": "b"})
    assert parsed.message.publish_time is not None


def test_both_spellings_that_pubsub_sends() -> None:
    body = json.loads(envelope())
    body["message"] |= {"message_id": "7", "publish_time": "2030-01-01T00:00:00Z"}
    assert parse_envelope(json.dumps(body).encode()).message.message_id == "7"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", ""),
        (b"[]", ""),
        (b"{}", "message"),
        (b'{"message": null}', "message"),
        (b'{"message": "text"}', "message"),
        (b'{"message": {}}', "message.messageId"),
        (envelope(messageId=7), "message.messageId"),
        (envelope(messageId=""), "message.messageId"),
        (envelope(data=7), "message.data"),
        (envelope(attributes=[]), "message.attributes"),
        (envelope(attributes={"a": 1}), "message.attributes.a"),
        (envelope(publishTime="then"), "message.publishTime"),
        (envelope(publishTime=1893456000), "message.publishTime"),
        (envelope(attributes={f"a{i}": "" for i in range(MAX_ATTRIBUTES + 1)}), "message.attributes"),
    ],
)
def test_a_bad_envelope_names_the_field(body: bytes, field: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        parse_envelope(body)
    assert caught.value.details["field"] == field


@pytest.mark.parametrize("data", ["%%%", "Y", "Y Q==", "é", "YQ=", "YQ===", "YQ==YQ", "====", "-_-_-"])
def test_data_that_is_not_base64(data: str) -> None:
    with pytest.raises(MalformedMessage, match=r"message\.data") as caught:
        parse_envelope(envelope(data=data)).payload()
    assert caught.value.details["field"] == "message.data"


@pytest.mark.parametrize("data", ["+/8/Pn5+YQ==", "+/8/Pn5+YQ", "-_8_Pn5-YQ==", "-_8_Pn5-YQ", "-/8_Pn5+YQ"])
def test_base64_is_read_in_either_alphabet_with_or_without_padding(data: str) -> None:
    assert parse_envelope(envelope(data=data)).payload() == b"\xfb\xff?>~~a"


def test_data_and_attributes_may_be_left_out_or_null() -> None:
    assert parse_envelope(b'{"message": {"messageId": "7", "attributes": {"a": "b"}}}').payload() == b""
    assert parse_envelope(envelope(data=None)).payload() == b""
    assert not parse_envelope(envelope(attributes=None)).message.attributes
    assert parse(parse_envelope(envelope(publishTime=None)).payload()) == parse(REQUIRED)


def test_the_largest_attributes_that_pubsub_takes_are_read() -> None:
    attributes = {f"{i:02}" + "," * 254: ":" * 1024 for i in range(MAX_ATTRIBUTES)}
    assert parse_envelope(envelope(attributes=attributes)).message.attributes == attributes


@pytest.mark.parametrize("values", ['"a%d":"x",', '"a%d":[],', '"a%d":{"b":1},'])
def test_more_values_than_a_message_can_have_are_not_parsed(values: str) -> None:
    # Not even closed: a parser would say so.
    body = '{"message":{"attributes":{' + "".join(values % i for i in range(100_000))
    with pytest.raises(MalformedMessage, match="more values than a message of Pub/Sub can have"):
        parse_envelope(body.encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_an_envelope_or_refused(body: bytes) -> None:
    try:
        payload = parse_envelope(body).payload()
    except MalformedMessage:
        return
    assert isinstance(payload, bytes)

"""Edits that are asked for over HTTP: bodies, uploaded pictures, and links against a real server on loopback."""

import asyncio
import base64
import json
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from serve_app.adapters.image_links import ImageLinks
from serve_app.edit.masks import Polarity
from serve_app.edit.paste import grow
from serve_app.edit.posted import AT_ONCE, InpaintBody
from serve_app.edit.session import session_path
from serve_app.errors import (
    BlobNotFound,
    FluxFillError,
    Forbidden,
    ImageTooLarge,
    InvalidImage,
    KeyReused,
    LinkRefused,
    MaskMismatch,
    MaskUnclear,
    MissingInput,
    NotSupported,
    QuotaExceeded,
    SettingsError,
    StoreUnavailable,
    Unavailable,
    UnknownVariant,
)
from serve_app.jobs.api import JobApi
from serve_app.jobs.kinds import Caller
from serve_app.jobs.ports import Verdict
from serve_app.jobs.record import Job, State
from serve_app.parameters import CropStrategy, EditParameters
from serve_app.settings import ApiSettings, Limits, Settings, WebhookSettings, WindowSettings

from . import webhook_receiver as servers
from .picture_files import chunk, with_chunks
from .pictures import kept
from .rig import SESSION, USER, Rig, jpeg, line_mask, photo, png
from .webhook_receiver import Answer, Receiver

PHOTO, MASK = jpeg(photo()), png(line_mask())
STORED = {"user_id": USER, "session_id": SESSION}
#: What no error may show.
SECRET = "sesame"


@pytest.fixture
async def rig() -> Rig:
    rig = Rig()
    await rig.put_session()
    return rig


def api(rig: Rig) -> JobApi:
    return JobApi(kinds=[rig.editor], job_store=rig.jobs, blobs=rig.blobs, notifier=rig.notifier, settings=rig.settings)


async def post(rig: Rig, job_id: str = "job-1", **body: Any) -> Job:
    return await rig.editor.post({"type": "inpaint", **body}, Caller(), job_id=job_id)


async def stored(rig: Rig, job_id: str = "job-1") -> list[bytes]:
    names = ("original.jpg", "mask_auto.png")
    blobs = [await rig.blobs.get(session_path("api", job_id, name), max_bytes=10**8) for name in names]
    return [data for data, _ in blobs]


def data_uri(data: bytes, type: str = "image/png") -> str:
    return f"data:{type};base64,{base64.b64encode(data).decode()}"


# Bodies


async def test_a_job_has_what_its_body_says_and_the_apps_defaults(rig: Rig) -> None:
    plain = await post(rig, session=STORED)
    defaults = rig.inference.model_dump(exclude={"variant"})
    assert (plain.variant, plain.parameters) == ("telea", EditParameters(**defaults))
    assert (plain.user_id, plain.session_id, plain.lock_key) == (USER, SESSION, f"{USER}/{SESSION}")
    assert rig.editor.inputs(plain) == rig.editor.outputs(plain) == []
    asked = {
        "prompt": "grass",
        "steps": 8,
        "guidance": 2.5,
        "seed": 7,
        "crop_strategy": "crop",
        "model": "telea",
        "strength": 0.8,
        "mask_grow": 0.02,
    }
    job = await post(rig, session=STORED, **asked)
    expected = EditParameters(
        prompt="grass", steps=8, guidance_scale=2.5, crop_strategy=CropStrategy.CROP, strength=0.8, mask_grow=0.02
    )
    assert (job.parameters, job.seed, job.variant) == (expected, 7, "telea")
    other_names = await post(rig, session=STORED, guidance_scale=2.5, model_id="telea")
    assert other_names.parameters == EditParameters(**{**defaults, "guidance_scale": 2.5})


async def test_a_seed_that_is_left_out_is_the_jobs_own(rig: Rig) -> None:
    seeds = [(await post(rig, id, session=STORED, **given)).seed for id in "ab" for given in ({}, {"seed": -1})]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert (await post(rig, session=STORED, seed=0)).seed == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps"),
    ({"steps": "8"}, "steps"),
    ({"steps": 8.5}, "steps"),
    ({"guidance": -1}, "guidance"),
    ({"guidance_scale": 101}, "guidance_scale"),
    ({"guidance": 1, "guidance_scale": 2}, "guidance_scale"),
    ({"seed": -2}, "seed"),
    ({"crop_strategy": "zoom"}, "crop_strategy"),
    ({"strength": 0}, "strength"),
    ({"mask_grow": 0.051}, "mask_grow"),
    ({"prompt": SECRET * 1000}, "prompt"),
    ({"model_id": "../x"}, "model_id"),
    ({"negative_prompt": SECRET}, "negative_prompt"),
    ({"userId": "u"}, "userId"),
    ({"session": {"user_id": "../x", "session_id": "s"}}, "session.user_id"),
    ({"session": {"user_id": "u"}}, "session.session_id"),
    ({"session": {**STORED, "bucket": "b"}}, "session.bucket"),
    ({"session": f"{USER}/{SESSION}"}, "session"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED, ids=str)
async def test_a_value_that_is_wrong_is_refused_by_its_name(rig: Rig, body: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        await post(rig, **{"session": STORED, **body})
    assert field in [".".join(map(str, error["loc"])) for error in refused.value.errors()]
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"image": PHOTO},
        {"mask": MASK},
        {"session": STORED, "image": PHOTO},
        {"session": STORED, "mask_polarity": "transparent"},
        {"image": PHOTO, "mask_polarity": "black"},
        {"session": STORED, "image": PHOTO, "mask": MASK},
        {"session": None, "image": None},
    ],
    ids=lambda body: "+".join(body) or "nothing",
)
async def test_a_photo_comes_from_one_place(rig: Rig, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give either session, or image and mask") as refused:
        await post(rig, **body)
    assert "JFIF" not in str(refused.value)


async def test_what_is_not_done_here_is_refused(rig: Rig) -> None:
    with pytest.raises(NotSupported, match="chain: ") as refused:
        await post(rig, session=STORED, chain={"upscale": {"scale": 2}})
    assert (refused.value.code, refused.value.http_status) == ("not_supported", 422)
    with pytest.raises(UnknownVariant, match="model_id: flux-dev edits no photos here; there are telea"):
        await post(rig, session=STORED, model_id="flux-dev")


def test_the_schema_says_what_a_picture_is() -> None:
    schema = InpaintBody.model_json_schema()
    assert schema["required"] == ["type"]
    for name in ("image", "mask"):
        assert schema["properties"][name]["anyOf"][0]["type"] == "string"
    for example in schema["examples"]:
        InpaintBody.model_validate(example)


# Sessions


@pytest.mark.parametrize("name", ["original.jpg", "mask_auto.png"])
async def test_a_session_without_photo_or_mask_is_missing(rig: Rig, name: str) -> None:
    await rig.blobs.delete(session_path(USER, SESSION, name))
    with pytest.raises(MissingInput, match=f"session: users/u1/sessions/s1/{name} is not in the blob store"):
        await post(rig, session=STORED)


async def test_another_jobs_uploads_are_no_session(rig: Rig) -> None:
    await post(rig, image=PHOTO, mask=MASK)
    with pytest.raises(MissingInput, match="session: "):
        await post(rig, "job-2", session={"user_id": "api", "session_id": "job-1"})


async def test_sessions_of_users_are_for_those_who_see_their_jobs(rig: Rig) -> None:
    body = {"type": "inpaint", "session": STORED}
    with pytest.raises(Forbidden, match=r"session: .* scope jobs"):
        await api(rig).post(body, Caller(id="app", sees_all=False, sees_messages=False))
    _, is_new = await api(rig).post(body, Caller(id="app", sees_all=False))
    assert is_new


# Uploads


@pytest.mark.parametrize("how", ["form", "data", "link"])
async def test_pictures_that_come_with_a_body_are_a_session_of_the_job(rig: Rig, how: str) -> None:
    given: dict[str, Any] = {
        "form": {"image": PHOTO, "mask": MASK},
        "data": {"image": data_uri(PHOTO, "image/jpeg"), "mask": data_uri(MASK).replace("=", "")},
        "link": {"image": "https://example.org/photo", "mask": "https://example.org/mask"},
    }[how]
    rig.linked.files = {"https://example.org/photo": PHOTO, "https://example.org/mask": MASK}
    job = await post(rig, **given)
    assert (job.user_id, job.session_id, job.lock_key) == ("api", "job-1", "api/job-1")
    assert await stored(rig) == [PHOTO, MASK]
    assert (await rig.blobs.head(session_path("api", "job-1", "original.jpg"))).content_type == "image/jpeg"


def cut_out(mode: str = "RGBA", hole: int = 0) -> bytes:
    """The photo, with an opacity of `hole` where it is to be painted."""
    opacity = np.where(line_mask() > 0, hole, 255).astype(np.uint8)
    image = Image.fromarray(np.dstack([photo(), opacity])).convert(mode)
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("mask", "polarity"),
    [
        (MASK, "white"),
        (png(255 - line_mask()), "black"),
        (cut_out(), "transparent"),
        (cut_out("LA"), "transparent"),
        (None, "transparent"),
    ],
    ids=["white", "black", "transparent", "transparent-grey", "the-photos-own"],
)
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
async def test_however_a_mask_is_drawn_all_outside_of_it_is_the_photos(
    rig: Rig, mask: bytes | None, polarity: str, format: str
) -> None:
    """Beyond the feather of the grown mask bit by bit, where the format is lossless."""
    rig.engine.fill = 0
    body = {"type": "inpaint", "image": cut_out(), "mask_polarity": polarity, "format": format}
    job, _ = await api(rig).post(body | ({"mask": mask} if mask else {}), Caller())
    await rig.notifier.drained()
    assert (await rig.take(rig.topics.sessions[-1])).reason == "succeeded"
    edited = (await api(rig).get(job.id, Caller())).artifacts[0]
    assert (edited.role, edited.content_type, edited.width, edited.height) == ("edited", f"image/{format}", 96, 80)
    pixels = np.asarray(Image.open(BytesIO(await api(rig).data(edited))).convert("RGB"))
    assert (pixels[line_mask() > 0] < (255 if format == "jpeg" else 1)).all()
    outside = kept(line_mask(), rig.settings.windows)
    if format == "jpeg":
        assert np.abs(pixels[outside].astype(int) - photo()[outside]).mean() < 2
    else:
        assert (pixels[outside] == photo()[outside]).all()


@pytest.mark.parametrize("mask_grow", [0, 0.03, 0.05, None])
async def test_an_edit_changes_the_grown_mask_and_its_feather_and_nothing_else(
    rig: Rig, mask_grow: float | None
) -> None:
    rig.engine.fill = 0
    given = {} if mask_grow is None else {"mask_grow": mask_grow}
    job, _ = await api(rig).post(
        {"type": "inpaint", "image": cut_out(), "mask": MASK, "format": "png", **given}, Caller()
    )
    await rig.notifier.drained()
    assert (await rig.take(rig.topics.sessions[-1])).reason == "succeeded"
    data = await api(rig).data((await api(rig).get(job.id, Caller())).artifacts[0])
    pixels = np.asarray(Image.open(BytesIO(data)))
    asked = WindowSettings(**given)
    outside, painted = kept(line_mask(), asked), kept(line_mask(), asked.model_copy(update={"feather_px": 0})) == 0
    assert (pixels[outside] == photo()[outside]).all()
    assert (pixels[painted] == 0).all()
    # Of 96 px.
    assert painted.sum() == (grow(line_mask(), {0: 0, 0.03: 3, 0.05: 5, None: 1}[mask_grow]) > 0).sum()


@pytest.mark.parametrize(("sent", "type"), [(PHOTO, "image/png"), (png(photo()), "image/png")])
async def test_a_mask_that_edits_nothing_gives_the_photo_in_the_format_that_was_asked_for(
    rig: Rig, sent: bytes, type: str
) -> None:
    job, _ = await api(rig).post(
        {"type": "inpaint", "image": sent, "mask": png(0 * line_mask()), "format": "png"}, Caller()
    )
    await rig.notifier.drained()
    assert (await rig.take(rig.topics.sessions[-1])).reason == "succeeded" and not rig.engine.painted
    edited = (await api(rig).get(job.id, Caller())).artifacts[0]
    assert edited.content_type == type
    shown, of = (np.asarray(Image.open(BytesIO(data))) for data in (await api(rig).data(edited), sent))
    assert (shown == of).all()


@pytest.mark.parametrize(
    ("mask", "polarity", "why"),
    [
        (MASK, "transparent", "no wholly transparent pixels"),
        (cut_out(hole=1), "transparent", "no wholly transparent pixels"),
        (None, "transparent", "no wholly transparent pixels"),
        (png(line_mask() | 128), "black", "no pixels darker than 128"),
        (PHOTO[:500], "white", "damaged"),
    ],
)
async def test_a_mask_that_says_nothing_is_refused_by_name(
    rig: Rig, mask: bytes | None, polarity: str, why: str
) -> None:
    with pytest.raises(FluxFillError, match=why) as refused:
        await post(rig, image=PHOTO, mask=mask, mask_polarity=polarity)
    assert refused.value.details["field"] == "mask"
    with pytest.raises(InvalidImage) as refused:
        await post(rig, image=PHOTO[:500], mask=MASK)
    assert refused.value.details["field"] == "image"


@pytest.mark.parametrize(("name", "usual", "others"), [("format", ["jpg", "jpeg"], ["png"]), ("strength", [1], [0.5])])
async def test_a_record_says_what_is_new_only_where_older_versions_could_not_paint_it(
    rig: Rig, name: str, usual: list[Any], others: list[Any]
) -> None:
    for value in usual + others:
        job = await post(rig, session=STORED, **{name: value})
        assert (f'"{name}"' in job.model_dump_json()) == (value in others)
        assert Job.model_validate_json(job.model_dump_json()) == job


async def test_it_is_painted_as_any_edit_and_deleted_with_its_uploads(rig: Rig) -> None:
    caller = Caller(id="app", sees_all=False, sees_messages=False)
    job, _ = await api(rig).post({"type": "inpaint", "image": PHOTO, "mask": MASK}, caller)
    await rig.notifier.drained()
    assert await rig.take(rig.topics.sessions[-1]) == Verdict(action="ack", reason="succeeded")
    done = await api(rig).get(job.id, caller)
    assert (done.status, rig.engine.painted) == (State.SUCCEEDED, 1)
    assert [event.artifact for event in done.events if event.cause is None] == [None, 0, 1]
    for path in done.paths.values():
        await rig.blobs.head(path)
    await api(rig).delete(job.id, caller)
    assert [blob.path async for blob in rig.blobs.list("users/api")] == []


async def test_the_same_edit_asked_for_twice_is_two_edits(rig: Rig) -> None:
    jobs = [(await api(rig).post({"type": "inpaint", "session": STORED}, Caller()))[0] for _ in range(2)]
    await rig.notifier.drained()
    for message in rig.topics.sessions:
        assert (await rig.take(message)).reason == "succeeded"
    assert len({(await api(rig).get(job.id, Caller())).seed for job in jobs}) == 2


async def test_a_job_too_many_leaves_no_uploads(rig: Rig) -> None:
    caller, body = Caller(id="app", sees_all=False), {"type": "inpaint", "image": PHOTO, "mask": MASK}
    rig.settings = rig.settings.model_copy(update={"api": ApiSettings(unfinished_jobs=1)})
    await api(rig).post(body, caller, job_id="first")
    with pytest.raises(QuotaExceeded):
        await api(rig).post(body, caller, job_id="second")
    assert {blob.path.split("/")[3] async for blob in rig.blobs.list("users/api")} == {"first"}


TALL = png(line_mask(80, 96))
DARK = png(line_mask() // 4)
TRUNCATED = PHOTO[: len(PHOTO) // 2]
BAD: list[tuple[str, dict[str, Any], type[FluxFillError]]] = [
    ("text", {"image": b"no picture"}, InvalidImage),
    ("empty", {"image": b""}, InvalidImage),
    ("cut", {"image": TRUNCATED}, InvalidImage),
    ("another format", {"image": b"GIF89a" + bytes(100)}, InvalidImage),
    ("a mask of another shape", {"mask": TALL}, MaskMismatch),
    ("a mask without bright pixels", {"mask": DARK}, MaskUnclear),
    ("a photo for a mask", {"mask": PHOTO}, MaskUnclear),
    ("not base64", {"image": "data:image/png;base64,%%%"}, InvalidImage),
    ("base64 of URLs", {"image": "data:image/png;base64,__-_"}, InvalidImage),
    ("not ASCII", {"image": "data:image/png;base64,\x80"}, InvalidImage),
    ("percent-encoded", {"image": "data:image/png,abc"}, InvalidImage),
    ("nothing in it", {"image": "data:"}, InvalidImage),
    ("bytes over the limit", {"image": PHOTO + bytes(30_000)}, ImageTooLarge),
    ("bytes over the limit, in base64", {"image": data_uri(PHOTO + bytes(30_000))}, ImageTooLarge),
    ("pixels over the limit", {"image": png(photo(400, 300)[..., 0])}, ImageTooLarge),
    ("a broken link", {"mask": "https://example.org/none"}, LinkRefused),
]


@pytest.mark.parametrize(("body", "error"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_a_picture_that_an_edit_would_not_take_is_refused_at_once(
    body: dict[str, Any], error: type[FluxFillError]
) -> None:
    rig = limited(image_bytes=30_000, image_pixels=100_000)
    with pytest.raises(error) as refused:
        await post(rig, **{"image": PHOTO, "mask": MASK, **body})
    assert refused.value.http_status in (413, 422)
    assert [blob.path async for blob in rig.blobs.list("users/api")] == []


def limited(**limits: int) -> Rig:
    rig = Rig()
    rig.editor._sessions._limits = Limits(**limits)
    return rig


async def test_a_retry_stores_the_same_and_another_photo_is_refused(rig: Rig) -> None:
    rig.blobs.is_down, rig.blobs.only = True, {"get"}
    first = await post(rig, image=PHOTO, mask=MASK)
    rig.blobs.is_down = False
    assert await post(rig, image=PHOTO, mask=data_uri(MASK)) == first
    another = with_chunks(MASK, chunk(b"teXt", b"a\0b"))
    for body in ({"image": jpeg(photo()[::-1]), "mask": MASK}, {"image": PHOTO, "mask": another}):
        with pytest.raises(KeyReused):
            await post(rig, **body)
    assert await stored(rig) == [PHOTO, MASK], "a running job's pictures stay"


@pytest.mark.parametrize("number", [1, 2])
async def test_a_post_that_broke_off_is_done_again(rig: Rig, number: int) -> None:
    put, calls = rig.blobs.put, 0

    async def breaks(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise StoreUnavailable("switched off")
        return await put(*args, **kwargs)

    rig.blobs.put = breaks
    with pytest.raises(StoreUnavailable):
        await post(rig, image=PHOTO, mask=MASK)
    await post(rig, image=PHOTO, mask=MASK)
    assert await stored(rig) == [PHOTO, MASK]


async def test_few_bodies_are_held_and_one_at_a_time_is_decoded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, running, most = threading.Event(), 0, 0
    sessions = rig.editor._sessions
    check = sessions._check

    def slow(photo: bytes, mask: bytes, polarity: Polarity) -> tuple[str, bytes]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert let_go.wait(30)
        running -= 1
        return check(photo, mask, polarity)

    monkeypatch.setattr(sessions, "_check", slow)
    held = [asyncio.create_task(post(rig, f"job-{n}", image=PHOTO, mask=MASK)) for n in range(AT_ONCE)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refused:
        await asyncio.wait_for(post(rig, "job-more", image=PHOTO, mask=MASK), 5)
    assert refused.value.details == {"retry_after_s": 1}
    assert (await post(rig, "job-other", session=STORED)).session_id == SESSION
    let_go.set()
    assert len(await asyncio.gather(*held)) == AT_ONCE and most == 1
    await post(rig, "job-more", image=PHOTO, mask=MASK)


# Links

MakeLinks = Callable[..., ImageLinks]


@pytest.fixture
async def make_links() -> AsyncIterator[MakeLinks]:
    made: list[ImageLinks] = []

    def make(*hosts: str, allow_http: bool = True, timeout_s: float = 10) -> ImageLinks:
        settings = Settings(
            variants={"telea": {}},
            api=ApiSettings(link_hosts=hosts),
            webhooks=WebhookSettings(allow_http=allow_http),
        )
        made.append(ImageLinks(settings, timeout_s=timeout_s))
        return made[-1]

    yield make
    for links in made:
        await links.close()


@pytest.fixture
async def server() -> AsyncIterator[Receiver]:
    async with servers.serve(servers.status(200, body=PHOTO)) as server:
        yield server


def fetch(links: ImageLinks, link: str, max_bytes: int = 10**6) -> Awaitable[bytes]:
    return links.fetch(link, field="image", max_bytes=max_bytes)


async def test_a_picture_is_fetched(make_links: MakeLinks, server: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    links = make_links(server.authority)
    assert await fetch(links, f"http://{server.authority}/photo?token={SECRET}", len(PHOTO)) == PHOTO
    (request,) = server.requests
    assert request.line == f"GET /photo?token={SECRET} HTTP/1.1"
    assert {"authorization", "cookie", "referer"}.isdisjoint(request.headers)


@pytest.mark.parametrize("code", [201, 204, 206, 301, 302, 303, 307, 308, 400, 401, 404, 500])
async def test_no_redirect_is_followed_and_no_other_answer_is_a_picture(
    make_links: MakeLinks, server: Receiver, code: int
) -> None:
    elsewhere = f"Location: http://{server.authority}/elsewhere"
    server.answer = servers.status(code, elsewhere, body=b"" if code == 204 else SECRET.encode())
    with pytest.raises(LinkRefused, match=f"image: {server.authority} answered {code}") as refused:
        await fetch(make_links(server.authority), f"http://{server.authority}/")
    assert len(server.requests) == 1 and SECRET not in str(refused.value)


@pytest.mark.parametrize("answer", [servers.status(200, body=PHOTO), servers.endless_body])
async def test_no_more_than_the_limit_is_read(make_links: MakeLinks, server: Receiver, answer: Answer) -> None:
    server.answer = answer
    with pytest.raises(LinkRefused, match=f"image: {server.authority} sent more than 900 bytes"):
        await fetch(make_links(server.authority), f"http://{server.authority}/", 900)


async def drop_by_drop(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("answer", [servers.silence, servers.endless_head, drop_by_drop])
async def test_a_slow_server_is_left(make_links: MakeLinks, server: Receiver, answer: Answer) -> None:
    server.answer = answer
    with pytest.raises(LinkRefused, match=r"did not answer within 0\.2 s"):
        await fetch(make_links(server.authority, timeout_s=0.2), f"http://{server.authority}/")


@pytest.mark.parametrize("answer", [servers.text(b""), servers.text(b"SSH-2.0-x\r\n\r\n"), servers.text(b"\x16\x03")])
async def test_what_is_no_answer_is_not_quoted(make_links: MakeLinks, server: Receiver, answer: Answer) -> None:
    server.answer = answer
    with pytest.raises(LinkRefused, match=f"image: {server.authority} did not answer: [A-Za-z]+$"):
        await fetch(make_links(server.authority), f"http://{server.authority}/{SECRET}")


async def test_nobody_listens(make_links: MakeLinks) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        authority = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(LinkRefused, match=f"image: {authority} cannot be reached"):
            await fetch(make_links(authority), f"http://{authority}/")


NOT_LISTED = [
    *("localhost", "127.0.0.1", "169.254.169.254", "metadata.google.internal", "[::1]", "10.0.0.7", "2130706433"),
    *("0x7f.1", "127.1", "example.org.evil.example", "evil-example.org", "sub.example.org", "example.org:8443"),
]


@pytest.mark.parametrize("host", NOT_LISTED)
async def test_a_host_that_is_not_listed_is_not_even_looked_up(
    make_links: MakeLinks, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("looked up"))
    for scheme in ("https", "http"):
        with pytest.raises(LinkRefused, match=r"image: '.+' is not listed in api\.link_hosts"):
            await fetch(make_links("example.org"), f"{scheme}://{host}/latest/meta-data")
        with pytest.raises(LinkRefused):
            await fetch(make_links(), f"{scheme}://{host}/")


REFUSED_LINKS = [
    ("http://example.org/", "its scheme is 'http', not https"),
    ("ftp://example.org/", "its scheme is 'ftp', not https"),
    ("file:///etc/passwd", "its scheme is 'file', not https"),
    ("/etc/passwd", "its scheme is '', not https"),
    ("photo.jpg", "its scheme is '', not https"),
    ("", "its scheme is '', not https"),
    (f"https://user:{SECRET}@example.org/", "it must not contain a user name or a password"),
    (f"https://{SECRET}@example.org/", "it must not contain a user name or a password"),
    (f"https://example.org\\@{SECRET}.example/", "."),
    (f"https://exa mple.org:{SECRET}/", "not a URL"),
    (f"https://example.org/{SECRET * 500}", "characters; at most 2048 are allowed"),
]


@pytest.mark.parametrize(("link", "why"), REFUSED_LINKS, ids=[row[0][:40] for row in REFUSED_LINKS])
async def test_a_link_that_may_not_be_fetched_says_why(make_links: MakeLinks, link: str, why: str) -> None:
    with pytest.raises(LinkRefused, match=f"^image: .*{why}") as refused:
        await fetch(make_links("example.org", allow_http=False), link)
    assert f"{SECRET}@" not in str(refused.value) and f":{SECRET}" not in str(refused.value)


@pytest.mark.parametrize("entry", ["https://example.org", "user@example.org", "example.org/x", ""])
def test_a_listed_host_that_is_none_stops_the_app(make_links: MakeLinks, entry: str) -> None:
    with pytest.raises(SettingsError, match=r"api\.link_hosts: "):
        make_links(entry)


async def test_pictures_by_links_become_a_job(make_links: MakeLinks, server: Receiver) -> None:
    async def either(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = server.requests[-1].line
        await servers.status(200, body=MASK if "mask" in asked else PHOTO)(_reader, writer)

    server.answer = either
    rig = Rig(name=uuid.uuid4().hex)
    rig.editor._sessions._links = make_links(server.authority)
    body = {name: f"http://{server.authority}/{name}" for name in ("image", "mask")}
    job = await rig.editor.post(json.loads(json.dumps({"type": "inpaint", **body})), Caller(), job_id="job-1")
    assert job.session_id == "job-1" and await stored(rig) == [PHOTO, MASK]
    with pytest.raises(BlobNotFound):
        await stored(rig, "job-2")

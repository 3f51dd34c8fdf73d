"""What is looked at before a job is asked for: its plan, its photo; what it was made of; and the workbench's files."""

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve_app.http.service import VariantReadiness

from .rig import jpeg, line_mask, photo, png
from .test_generate import Studio
from .test_job_api import Site, refused

FILL = {"definition": {"family": "flux-fill", "file": "x/Q8_0.gguf", "base": "none"}, "price_per_hour": 3600.0}


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site(Studio(variants={"telea": {}, "fill": FILL}))
    async with made.http:
        yield made


async def plan(site: Site, mask: bytes | None, **job: Any) -> Any:
    files = {"mask": ("mask", mask)} if mask else {"other": ("x", b"")}
    return await site.http.post("/v1/jobs/plan", data={"job": json.dumps(job)}, files=files)


async def test_a_plan_says_what_would_be_painted(site: Site) -> None:
    answer = await plan(site, png(line_mask(1200, 900)), steps=10, strength=0.55, model_id="fill", crop_strategy="crop")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    (window,) = found["windows"]
    assert (window["model_width"], window["model_height"]) == (256, 256)
    assert (window["width"], window["height"]) == (256, 256)
    assert 0 <= window["x"] <= 20 - 7 and window["x"] + window["width"] <= 1200
    assert found["steps_run"] == 6
    # 57 blocks of 12 d² weights and two products of attention, over 512 tokens of text and 256 of the picture.
    step = 57 * (24 * 3072**2 * 768 + 4 * 768**2 * 3072) / 1e12
    assert found["tflop"] == pytest.approx(6 * step)
    assert (found["seconds"], found["card"], found["cost"]) == (None, None, None)
    assert await site.studio.paths() == [] and await site.get("/v1/jobs") == {"jobs": [], "next_cursor": None}


async def test_on_a_known_card_it_says_how_long_it_takes_and_its_price(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card = {name: VariantReadiness(state="ready", where={"device": "NVIDIA L4"}) for name in ("telea", "fill")}
    monkeypatch.setattr(site.process, "models", lambda: on_card)
    found = (await plan(site, png(line_mask(1200, 900)), steps=10, model_id="fill")).json()
    assert found["card"] == "L4" and 1 < found["seconds"] < 60
    assert found["cost"] == pytest.approx(found["seconds"])
    telea = (await plan(site, png(line_mask(1200, 900)), model_id="telea")).json()
    assert (telea["tflop"], telea["seconds"], telea["steps_run"]) == (None, None, 1)


async def test_windows_lie_on_the_photo(site: Site) -> None:
    mask = np.zeros((700, 2000), np.uint8)
    mask[10:60, 10:60] = mask[600:690, 1900:1990] = 255
    found = (await plan(site, png(mask), crop_strategy="original")).json()
    assert len(found["windows"]) > 1
    for window in found["windows"]:
        assert window["x"] >= 0 and window["x"] + window["width"] <= 2000
        assert window["y"] >= 0 and window["y"] + window["height"] <= 700
    assert (await plan(site, png(np.zeros_like(mask)))).json()["windows"] == []


async def test_a_plan_is_refused_as_its_job_would_be(site: Site) -> None:
    mask = png(line_mask())
    assert refused(await plan(site, mask, model_id="sdxl")) == (422, "unknown_variant")
    assert refused(await plan(site, mask, steps=0)) == (422, "invalid_request")
    assert refused(await plan(site, mask, type="generate", prompt="x")) == (422, "invalid_request")
    assert refused(await plan(site, None)) == (422, "invalid_request")
    assert refused(await plan(site, b"no picture")) == (422, "invalid_image")


async def test_a_photo_is_shown_upright_in_all_its_pixels(site: Site) -> None:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(64, 48)).save(out, "JPEG", exif=exif)
    answer = await site.http.post("/v1/photos", files={"content": ("photo", out.getvalue())})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(answer.content)).size == (48, 64)
    refusal = await site.http.post("/v1/photos", files={"content": ("photo", b"no photo")})
    assert refused(refusal) == (422, "invalid_image")


async def test_what_a_job_was_made_of_is_linked(site: Site) -> None:
    sent = {"image": ("a", jpeg(photo())), "mask": ("b", png(line_mask()))}
    posted = await site.http.post("/v1/jobs", data={"job": json.dumps({"type": "inpaint"})}, files=sent)
    made = (await site.get(f"/v1/jobs/{posted.json()['job']['id']}/inputs"))["inputs"]
    assert [one["role"] for one in made] == ["original", "mask"]
    assert all("/blobs/" in one["url"] for one in made)
    pictures = await site.post()
    assert await site.get(f"/v1/jobs/{pictures['id']}/inputs") == {"inputs": []}


# The page


async def test_the_page_may_load_and_run_only_what_is_its_own(site: Site) -> None:
    answer = await site.http.get("/")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    link = site.studio.settings.public_url
    assert answer.headers["Content-Security-Policy"] == (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data: {link}; "
        f"connect-src 'self' {link}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for name, type in {"main.js": "text/javascript", "style.css": "text/css"}.items():
        file = await site.http.get(f"/web/{name}")
        assert (file.status_code, file.headers["Content-Type"]) == (200, f"{type}; charset=utf-8")
    for name in ("none.js", "konva.LICENSE", "..%2Fsettings.py", "vendor"):
        assert (await site.http.get(f"/web/{name}")).status_code in (404, 422)


async def test_the_page_can_be_switched_off() -> None:
    site = Site(Studio(api={"workbench": False}))
    async with site.http:
        for path in ("/", "/web/main.js"):
            assert refused(await site.http.get(path)) == (404, "not_found")

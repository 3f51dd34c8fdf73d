"""The workbench in a browser, before a real app with a worker behind it: a person paints, asks, watches, compares."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Locator, Page, expect

from serve_app.http.workbench import WEB
from serve_app.models import Pixels

from .absent import absent
from .browser import Watched
from .client_server import in_thread
from .rig import Held, photo
from .test_generate import Studio

pytestmark = pytest.mark.emulator

DESKTOP, PHONE = (1280, 900), (390, 844)
AXE = Path("node_modules/axe-core/axe.min.js")
NPM = "npm installs the workbench's packages: apt-get install npm, then make web"
EVIL = "<img src=x onerror=document.title='evil'>"
KEY = "a-key-of-the-workbench's-own-user"


class Site:
    """An app of one process, and one page at a time before it."""

    def __init__(self, url: str, studio: Studio) -> None:
        self.url, self.studio = url, studio
        self.process = studio.served

    def engine(self, variant: str) -> Any:
        return self.studio.editor._models[variant]._engine

    def mask(self, page: Page) -> Pixels:
        """The one that came with the job that the page shows, as the app has it."""
        answer = requests.get(f"{self.url}/v1/jobs/{job_of(page)}/inputs", headers={"X-API-Key": KEY})
        links = {one["role"]: one["url"] for one in answer.json()["inputs"]}
        image = Image.open(io.BytesIO(requests.get(links["mask"]).content))
        red, *others, alpha = np.moveaxis(np.asarray(image.convert("RGBA")), 2, 0)
        assert image.format == "PNG" and (alpha == 255).all() and all(np.array_equal(red, one) for one in others)
        return red

    @contextmanager
    def opened(
        self, browser: Browser, size: tuple[int, int] = DESKTOP, allowed: str = "none", **options: Any
    ) -> Iterator[Page]:
        """The page, which may complain only of what holds `allowed`, and ask no one but its own app."""
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        page = context.new_page()
        watched = Watched(page)
        page.goto(f"{self.url}/")
        yield page
        assert [text for text in watched.complaints if allowed not in text] == []
        own = (f"{self.url}/", f"blob:{self.url}/")
        assert [url for url in watched.fetched if not url.startswith(own) or KEY in url] == []
        context.close()


@contextmanager
def site_of(*, api_keys: str | None = None) -> Iterator[Site]:
    if not (WEB / "vendor" / "konva.min.js").exists() or not AXE.exists():
        absent(NPM)
    variants = {"telea": {}, "Q8_0": {}}
    with in_thread(lambda url: Studio(public_url=url, variants=variants), api_keys=api_keys) as (url, studio):
        yield Site(url, studio)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with site_of() as made:
        yield made


def picture(size: tuple[int, int] = (320, 240), orientation: int = 1, name: str = "photo.jpg") -> FilePayload:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(*size)).save(out, "JPEG", quality=95, exif=exif)
    return {"name": name, "mimeType": "image/jpeg", "buffer": out.getvalue()}


def job_of(page: Page) -> str:
    found: str = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('job')")
    return found


def shown(page: Page) -> Pixels:
    """The mask as the page shows it: 255 where it is painted."""
    flat = page.evaluate(
        """() => {
          const { width, height } = Konva.stages[0].find("Image")[1].image();
          const pen = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
          pen.drawImage(Konva.stages[0].find("Image")[1].image(), 0, 0);
          const { data } = pen.getImageData(0, 0, width, height);
          return [width, height, ...data.filter((_, i) => i % 4 === 3)];
        }"""
    )
    return np.array(flat[2:], np.uint8).reshape(flat[1], flat[0])


def stroke(size: tuple[int, int], ends: tuple[tuple[float, float], tuple[float, float]]) -> Pixels:
    """How far each pixel's centre is from the line between `ends`, in the photo's pixels."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    (x0, y0), (x1, y1) = ends
    along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
    t = np.clip(along, 0, 1)
    return np.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0))


def fitted(box: Any, size: tuple[int, int], zoom: float) -> Any:
    """Where a pixel of the photo is on the page: the photo is fitted into the board, then zoomed about its middle."""
    scale = min(box["width"] / size[0], box["height"] / size[1]) * zoom
    left, top = box["x"] + (box["width"] - size[0] * scale) / 2, box["y"] + (box["height"] - size[1] * scale) / 2
    return lambda x, y: (left + x * scale, top + y * scale)


def open_photo(page: Page, file: FilePayload) -> Any:
    page.set_input_files(".open-photo", file)
    expect(page.locator(".name")).to_contain_text(file["name"])
    box = page.locator(".board").bounding_box()
    assert box is not None
    return box


def transfer(page: Page, file: FilePayload) -> Any:
    return page.evaluate_handle(
        """({ name, type, bytes }) => {
          const data = new DataTransfer();
          data.items.add(new File([Uint8Array.from(bytes)], name, { type }));
          return data;
        }""",
        {"name": file["name"], "type": file["mimeType"], "bytes": list(file["buffer"])},
    )


def drop(page: Page, place: str, file: FilePayload) -> None:
    data = transfer(page, file)
    page.dispatch_event(place, "dragover", {"dataTransfer": data})
    expect(page.locator(".zones")).to_be_visible()
    page.dispatch_event(place, "drop", {"dataTransfer": data})
    expect(page.locator(".zones")).to_be_hidden()


def paste(page: Page, file: FilePayload) -> None:
    clipboard = "clipboardData => dispatchEvent(new ClipboardEvent('paste', { clipboardData }))"
    page.evaluate(clipboard, transfer(page, file))


def paint_anywhere(page: Page) -> None:
    box = page.locator(".board").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 - 30, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 30, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()


def ask(page: Page) -> None:
    page.get_by_role("button", name="Paint", exact=True).click()
    expect(page.locator(".compare")).to_be_visible(timeout=20_000)


def slides(page: Page) -> Locator:
    return page.locator("img-comparison-slider")


class Fingers:
    """On a touch screen."""

    def __init__(self, page: Page) -> None:
        self._session = page.context.new_cdp_session(page)

    def at(self, *points: tuple[float, float], type: str = "touchMove") -> None:
        touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self._session.send("Input.dispatchTouchEvent", {"type": type, "touchPoints": touches})

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
        self.at(start, type="touchStart")
        for k in range(1, steps + 1):
            self.at((start[0] + (end[0] - start[0]) * k / steps, start[1] + (end[1] - start[1]) * k / steps))
        self.at(type="touchEnd")


# What is painted is what arrives


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("zooms", [0, 2])
@pytest.mark.parametrize("hand", ["mouse", "touch"])
def test_what_is_painted_is_what_arrives(browser: Browser, site: Site, hand: str, zooms: int, orientation: int) -> None:
    size = (240, 320) if orientation == 6 else (320, 240)
    with site.opened(browser, PHONE if hand == "touch" else DESKTOP, has_touch=hand == "touch") as page:
        box = open_photo(page, picture(orientation=orientation))
        for _ in range(zooms):
            page.get_by_role("button", name="Zoom in").click()
        place = fitted(page.locator(".board").bounding_box(), size, 1.5**zooms)
        ends = (size[0] / 2 - 25, size[1] / 2 - 10), (size[0] / 2 + 20, size[1] / 2 + 15)
        if hand == "touch":
            Fingers(page).drag(place(*ends[0]), place(*ends[1]))
        else:
            page.mouse.move(*place(*ends[0]))
            page.mouse.down()
            page.mouse.move(*place(*ends[1]), steps=8)
            page.mouse.up()
        assert box["width"] > 300
        seen = shown(page)
        ask(page)
        arrived = site.mask(page)
        radius = round(max(size) / 25) / 2
        distance = stroke(size, ends)
    assert np.array_equal(arrived, seen)
    # A CSS pixel is a part of a photo's; a touch is rounded to one.
    assert (arrived[distance < radius - 1] == 255).all() and (arrived[distance > radius + 1] == 0).all()


def test_two_fingers_move_and_zoom_and_paint_nothing(browser: Browser, site: Site) -> None:
    with site.opened(browser, PHONE, has_touch=True) as page:
        box = open_photo(page, picture())
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        fingers = Fingers(page)
        was = page.evaluate("Konva.stages[0].scaleX()")
        # The first finger comes a little before the second.
        fingers.at((x - 20, y), type="touchStart")
        fingers.at((x - 22, y))
        fingers.at((x - 22, y), (x + 20, y), type="touchStart")
        for k in range(1, 11):
            fingers.at((x - 22 - 5 * k, y + 3 * k), (x + 20 + 5 * k, y + 3 * k))
        fingers.at(type="touchEnd")
        assert page.evaluate("Konva.stages[0].scaleX()") / was == pytest.approx((20 + 22 + 100) / 42, rel=0.02)
        assert not shown(page).any()
        expect(page.get_by_role("button", name="Undo")).to_be_disabled()


def test_painting_by_keys(browser: Browser, site: Site) -> None:
    with site.opened(browser) as page:
        open_photo(page, picture())
        page.locator(".board").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".cursor")).to_have_text("Cursor at 153, 120")
        page.keyboard.down(" ")
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        page.keyboard.up(" ")
        painted = shown(page)
        distance = stroke((320, 240), ((153, 120), (181, 120)))
        assert (painted[distance < 6] == 255).all() and not painted[distance > 7.1].any()
        page.keyboard.press("e")
        page.keyboard.press(" ")
        erased = shown(page)
        assert not erased[118:122, 179:183].any() and erased[119, 160]
        page.keyboard.press("Control+z")
        assert np.array_equal(shown(page), painted)
        page.keyboard.press("Control+Shift+Z")
        assert np.array_equal(shown(page), erased)
        page.keyboard.press("i")
        assert np.array_equal(shown(page), 255 - erased)
        page.get_by_role("button", name="Clear").click()
        assert not shown(page).any()
        expect(page.get_by_role("button", name="Paint", exact=True)).to_be_disabled()
        page.keyboard.press("]")
        expect(page.locator(".size-px")).to_have_text("16 px")


def test_a_photo_is_dropped_or_pasted_and_its_mask_dropped(browser: Browser, site: Site) -> None:
    mask = np.zeros((240, 320), np.uint8)
    mask[60:120, 80:160] = 255
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    with site.opened(browser) as page:
        drop(page, ".empty", picture(name="dropped.jpg"))
        expect(page.locator(".name")).to_have_text("dropped.jpg, 320 \u00d7 240")
        paste(page, picture((160, 120), name="pasted.jpg"))
        expect(page.locator(".name")).to_have_text("pasted.jpg, 160 \u00d7 120")
        drop(page, "header", picture(name="beside.jpg"))
        expect(page.locator(".name")).to_have_text("beside.jpg, 320 \u00d7 240")
        drop(page, ".as-mask", {"name": "mask.png", "mimeType": "image/png", "buffer": out.getvalue()})
        expect(page.get_by_role("button", name="Undo")).to_be_enabled()
        assert np.array_equal(shown(page), mask)
        page.get_by_label("Format").select_option("png")
        ask(page)
        assert np.array_equal(site.mask(page), mask)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == "edited.png"


def test_a_mask_is_opened(browser: Browser, site: Site) -> None:
    drawn = np.zeros((120, 160, 4), np.uint8)
    drawn[30:60, 40:80] = 255
    drawn[70:80] = (255, 255, 255, 0)

    def file(pixels: Any) -> FilePayload:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return {"name": "mask.png", "mimeType": "image/png", "buffer": out.getvalue()}

    with site.opened(browser) as page:
        open_photo(page, picture())
        page.set_input_files(".open-mask", file(drawn))
        expect(page.get_by_role("button", name="Undo")).to_be_enabled()
        expected = np.zeros((240, 320), np.uint8)
        expected[60:120, 80:160] = 255
        assert np.array_equal(shown(page), expected)
        page.set_input_files(".open-mask", file(drawn[:, :60]))
        expect(page.locator("#notice")).to_contain_text("This mask does not fit the photo")
        assert np.array_equal(shown(page), expected)


# From the photo to the result


def test_an_edit_is_planned_asked_for_watched_and_compared(browser: Browser, site: Site) -> None:
    engine, held = site.engine("telea"), Held()
    with site.opened(browser) as page:
        open_photo(page, picture((1200, 900)))
        paint_anywhere(page)
        expect(page.locator(".plan")).to_contain_text("1 window of")
        assert page.evaluate("Konva.stages[0].find('Rect').length") == 2
        page.locator("#edit").get_by_label("Prompt").fill("sand")
        page.locator("#edit").get_by_label("Steps").fill("4")
        page.locator("#edit").get_by_label("Seed").fill("7")
        engine.on_paint = held
        page.get_by_role("button", name="Paint", exact=True).click()
        expect(page.locator(".state")).to_have_text("Painting")
        job_id = job_of(page)
        # It is still there.
        page.reload()
        expect(page.locator(".state")).to_have_text("Painting")
        assert job_of(page) == job_id
        held.let_go.set()
        engine.on_paint = lambda: None
        expect(page.locator(".compare")).to_be_visible(timeout=20_000)
        expect(page.locator(".state")).to_have_text("Done")
        # And what it was made of, so that it can be done again.
        expect(page.locator("#edit").get_by_label("Prompt")).to_have_value("sand")
        assert np.array_equal(shown(page), site.mask(page))
        job = requests.get(f"{site.url}/v1/jobs/{job_id}").json()
        assert job["parameters"].items() >= {"prompt": "sand", "steps": 4, "seed": 7, "model_id": "telea"}.items()

        slider = slides(page)
        slider.focus()
        before = slider.evaluate("one => one.value")
        page.keyboard.down("ArrowRight")
        page.wait_for_function("was => document.querySelector('img-comparison-slider').value > was + 5", arg=before)
        page.keyboard.up("ArrowRight")
        page.get_by_role("button", name="Pixels").click()
        widths = page.evaluate("[...document.querySelectorAll('.compare img')].map((one) => one.style.width)")
        assert set(widths) == {"1200px"}
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == "edited.jpg"

        page.get_by_role("button", name="Again with this variant").click()
        expect(page.locator(".against")).to_have_value("1", timeout=20_000)
        again = requests.get(f"{site.url}/v1/jobs/{job_of(page)}").json()
        assert again["id"] != job_id
        assert again["parameters"].items() >= {"prompt": "sand", "seed": 7, "model_id": "Q8_0"}.items()
        page.get_by_role("button", name="Side by side").click()
        expect(page.locator("figcaption")).to_have_text(["telea, seed 7", "Q8_0, seed 7"])
        page.get_by_role("button", name="Again with this seed").click()
        expect(page.locator("#edit").get_by_label("Prompt")).to_be_focused()
        expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("7")


def test_a_job_is_canceled(browser: Browser, site: Site) -> None:
    engine, held = site.engine("telea"), Held()
    engine.on_paint = held
    with site.opened(browser) as page:
        open_photo(page, picture())
        paint_anywhere(page)
        page.get_by_role("button", name="Paint", exact=True).click()
        expect(page.locator(".state")).to_have_text("Painting")
        page.get_by_role("button", name="Cancel").click()
        held.let_go.set()
        engine.on_paint = lambda: None
        expect(page.locator(".state")).to_have_text("Canceled")
        expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
        expect(page.locator(".compare")).to_be_hidden()


# What a person is told


def test_a_key_is_asked_for_and_goes_into_no_address(browser: Browser) -> None:
    with site_of(api_keys=f"{KEY}:jobs") as site, site.opened(browser, allowed="401") as page:
        open_photo(page, picture())
        paint_anywhere(page)
        expect(page.locator(".plan")).to_contain_text(
            "This app asks for an API key: enter yours at the top of the page."
        )
        page.get_by_role("button", name="Paint", exact=True).click()
        expect(page.locator("#notice")).to_contain_text("This app asks for an API key")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        ask(page)
        page.reload()
        expect(page.locator("#notice")).to_contain_text("This app asks for an API key")
        assert KEY not in page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        )
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        expect(page.locator(".compare")).to_be_visible()
        assert np.array_equal(shown(page), site.mask(page))


def test_a_variant_that_is_not_ready_says_so(browser: Browser, site: Site) -> None:
    site.process.state = "scaled_to_zero"
    try:
        with site.opened(browser, allowed="503") as page:
            expect(page.get_by_label("Variant").first).to_contain_text("telea (starts when asked)")
            open_photo(page, picture())
            paint_anywhere(page)
            expect(page.locator(".plan")).to_contain_text("a cold start before")
            site.process.state = "failed"
            page.reload()
            expect(page.locator(".none-ready")).to_be_visible()
    finally:
        site.process.state = "ready"


def test_what_is_no_photo_is_refused_in_the_apps_words(browser: Browser, site: Site) -> None:
    with site.opened(browser, allowed="422") as page:
        page.set_input_files(".open-photo", {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"no photo"})
        expect(page.locator("#notice")).to_contain_text("the photo is")
        expect(page.locator("#notice")).to_have_class("notice error")


def test_a_heic_is_shown_by_the_app(browser: Browser, site: Site) -> None:
    heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    heif.from_pillow(Image.fromarray(photo(96, 80))).save(out, quality=90)
    with site.opened(browser) as page:
        open_photo(page, {"name": "photo.heic", "mimeType": "image/heic", "buffer": out.getvalue()})
        expect(page.locator(".name")).to_have_text("photo.heic, 96 \u00d7 80")
        paint_anywhere(page)
        ask(page)
        assert site.mask(page).shape == (80, 96)


def test_names_and_prompts_stay_text(browser: Browser, site: Site) -> None:
    with site.opened(browser) as page:
        open_photo(page, picture(name=f"{EVIL}.jpg"))
        expect(page.locator(".name")).to_have_text(f"{EVIL}.jpg, 320 \u00d7 240")
        paint_anywhere(page)
        page.locator("#edit").get_by_label("Prompt").fill(EVIL)
        ask(page)
        page.reload()
        expect(page.locator("#edit").get_by_label("Prompt")).to_have_value(EVIL)
        expect(page.locator(".compare")).to_be_visible()
        assert page.title() == "flux-fill-serve workbench"
        assert page.evaluate("[...document.images].every((one) => one.closest('.compare'))")


def test_a_page_without_its_packages_says_how_to_build_it(browser: Browser, site: Site) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.route("**/web/konva.min.js", lambda route: route.abort())
    page.goto(site.url)
    expect(page.locator("#not-built")).to_have_text(
        "The workbench is not built: run make web where the app is installed, then start the app again."
    )
    context.close()


# Who sees it


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, (360, 740)], ids=str)
def test_axe_finds_nothing_and_nothing_is_cut_off(
    browser: Browser, site: Site, size: tuple[int, int], scheme: Any
) -> None:
    def look(page: Page) -> None:
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run()")
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0

    with site.opened(browser, size, color_scheme=scheme) as page:
        look(page)
        open_photo(page, picture())
        paint_anywhere(page)
        expect(page.locator(".plan")).to_contain_text("window")
        look(page)
        ask(page)
        look(page)
        page.get_by_role("button", name="Side by side").click()
        look(page)

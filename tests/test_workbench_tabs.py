"""The workbench's tabs Generate, Jobs and Audits, in a browser, against the app over memory stores."""

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from serve_app.adapters.memory import MemoryBlobStore, MemoryJobStore
from serve_app.clock import utc_now
from serve_app.edit.session import session_path
from serve_app.engine.fake import Fake
from serve_app.engine.generating import LocalGenerator
from serve_app.errors import BlankImage
from serve_app.generate.loras import Lora
from serve_app.http.workbench import WEB
from serve_app.jobs.kinds import Caller
from serve_app.models import GenerateRequest, Images, LoraFacts, OnProgress, Variant
from serve_app.settings import VariantSettings

from .absent import absent
from .browser import Watched
from .client_server import in_thread
from .rig import SESSION, USER, jpeg, line_mask, photo, png
from .test_audit_api import Site
from .test_generate import Studio
from .test_workbench import AXE, DESKTOP, NPM
from .tiny_studio import TinyStudios

pytestmark = pytest.mark.emulator

PHONE = (360, 800)
#: Were it markup, it would change the title.
EVIL = '<img src=x onerror="document.title=`evil`"><b>bold</b>'


class Cards:
    """The fake engine, which does what a test tells it."""

    is_ready = True

    def __init__(self) -> None:
        self._fake = LocalGenerator("fake", Fake(Variant(family="fake"), None, VariantSettings()))
        self.requests: list[GenerateRequest] = []
        self.fault = ""
        #: Pictures that it may make.
        self.may_make = threading.Semaphore(0)
        self.is_held = False

    async def run(self, request: GenerateRequest, on_progress: OnProgress) -> Images:
        self.requests.append(request)
        if self.fault:
            raise BlankImage(self.fault)
        while self.is_held and not self.may_make.acquire(blocking=False):
            await asyncio.sleep(0.01)
        # Cards are drawn without.
        return await self._fake.run(replace(request, loras=()), on_progress)


class Server:
    def __init__(self, url: str, studio: Studio) -> None:
        self.url, self.studio, self.cards = url, studio, studio.painter
        self.process = studio.served
        #: Of audits' jobs.
        self.audits = Site(self.process, None)  # type: ignore[arg-type]

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """In a thread, because Playwright's loop runs in this one."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, work).result()


def make(url: str, **given: Any) -> Studio:
    generators = {"fake": {}, "sdxl": {}, "flux-dev-Q8_0": {"max_count": 4}}
    return Studio(public_url=url, painter=Cards(), clock=utc_now, generators=generators, price_per_hour=3600.0, **given)  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[Server]:
    with in_thread(make) as (url, studio):
        yield Server(url, studio)


@contextmanager
def opened(
    browser: Browser, url: str, tab: str, size: tuple[int, int] = DESKTOP, job: str = "", **options: Any
) -> Iterator[Page]:
    """The tab, which may complain of nothing and ask no one else."""
    if not (WEB / "vendor" / "konva.min.js").exists() or not AXE.exists():
        absent(NPM)
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    page = context.new_page()
    watched = Watched(page)
    page.goto(f"{url}/#tab={tab}&job={job}")
    yield page
    # The browser's own line on an answer that is an error.
    own = "Failed to load resource: the server responded with"
    assert [one for one in watched.complaints if not one.startswith(own)] == []
    assert [one for one in watched.fetched if not one.startswith(f"{url}/")] == []
    assert page.title() == "flux-fill-serve workbench" and page.locator("b").count() == 0
    context.close()


def check(page: Page) -> None:
    """Nothing that axe knows is wrong, and nothing is wider than the screen."""
    # Not by a script element, which the policy forbids.
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))")
    assert found == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def ask(page: Page, prompt: str, **fields: Any) -> None:
    form = page.locator("#generate form")
    form.locator("[name=prompt]").fill(prompt)
    for name, value in {"width": 128, "height": 64, "steps": 2, "seed": 7, **fields}.items():
        form.locator(f"[name={name}]").fill(str(value))
    form.get_by_role("button", name="Generate").click()


def failed(page: Page, server: Server, why: str = "every pixel is the same") -> None:
    server.cards.fault = why
    ask(page, EVIL)
    expect(page.locator("#generate .log")).to_have_text(why)
    server.cards.fault = ""


# Generate


@pytest.mark.parametrize(("size", "colours"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_pictures_land_one_by_one_with_their_seeds(
    browser: Browser, server: Server, size: tuple[int, int], colours: Any
) -> None:
    server.cards.is_held = True
    with opened(browser, server.url, "generate", size, color_scheme=colours) as page:
        expect(page.locator("#generate")).to_contain_text("Nothing here yet")
        check(page)
        ask(page, "a forest", count=2)
        state, figures = page.locator("#generate .state"), page.locator("#generate figure")
        expect(state).to_have_text("Painting")
        server.cards.may_make.release()
        expect(figures).to_contain_text(["Seed 7"])
        expect(page.locator("#generate .share")).to_contain_text("50%")
        server.cards.may_make.release()
        expect(state).to_have_text("Done")
        expect(figures).to_contain_text(["Seed 7", "Seed 8"])
        assert figures.locator("img").first.get_attribute("alt") == "a forest"
        expect(page.locator("#generate").get_by_role("button", name="Cancel")).to_be_hidden()
        check(page)
        with page.expect_download() as download:
            figures.last.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename.endswith("_1_128x64_8.png")
        with Image.open(download.value.path()) as picture:
            assert picture.size == (128, 64)
        page.reload()
        expect(figures).to_contain_text(["Seed 7", "Seed 8"])


def test_a_running_job_is_canceled_and_keeps_what_it_has(browser: Browser, server: Server) -> None:
    server.cards.is_held = True
    with opened(browser, server.url, "generate") as page:
        ask(page, "a forest", count=2)
        server.cards.may_make.release()
        expect(page.locator("#generate figure")).to_have_count(1)
        page.locator("#generate").get_by_role("button", name="Cancel").press("Enter")
        expect(page.locator("#generate .state")).to_have_text("Canceled")
        expect(page.locator("#generate figure")).to_have_count(1)


def test_what_the_model_takes_is_offered_and_sent(browser: Browser, server: Server) -> None:
    facts = LoraFacts(
        family="flux", format="diffusers", dtype="F16", rank=4, layers=1, has_alpha=False, alpha_scale=(1, 1)
    )
    lora = Lora(
        id="e3b0c442" + 24 * "0", owner="", name=EVIL, version="1", trigger_word="TOK", path="x", blob_version="1",
        sha256=64 * "0", size_bytes=1, alpha=None, facts=facts, created_at=datetime.now(UTC),
    )  # fmt: skip
    record, path = lora.model_dump_json().encode(), f"loras/e3b0c442/{24 * '0'}.json"
    server.do(server.studio.blobs.put(path, record, content_type="application/json"))
    with opened(browser, server.url, "generate") as page:
        form = page.locator("#generate form")
        model, negative = form.locator("[name=model_id]"), form.get_by_label("Negative prompt")
        expect(model.locator("option")).to_have_text(["fake", "sdxl", "flux-dev-Q8_0"])
        model.select_option("sdxl")
        expect(form.get_by_text("None for this model")).to_be_visible()
        expect(form.locator("[name=steps]")).to_have_attribute("placeholder", "30")
        negative.fill("dogs")
        ask(page, "a cat")
        expect(page.locator("#generate figure")).to_have_count(1)
        model.select_option("flux-dev-Q8_0")
        expect(negative).to_be_hidden()
        expect(form).to_contain_text("no negative prompt")
        form.get_by_role("checkbox", name=EVIL).check()
        form.get_by_label(f"Weight of {EVIL}").fill("0.8")
        ask(page, "TOK", width="")
        expect(page.locator("#generate h2").first).to_have_text("TOK")
        expect(page.locator("#generate figure")).to_have_count(1)
        expect(form.get_by_role("checkbox", name=EVIL)).to_be_checked()
        check(page)
    first, second = server.cards.requests
    assert (first.negative_prompt, first.steps, first.seed) == ("dogs", 2, 7)
    assert (second.negative_prompt, second.width) == ("", 1024)
    assert [(one.id, one.scale) for one in second.loras] == [(lora.id, 0.8)]


def test_a_cold_model_is_said_to_be_one(browser: Browser, server: Server) -> None:
    server.process.state = "scaled_to_zero"
    with opened(browser, server.url, "generate") as page:
        expect(page.locator("#about-model")).to_contain_text("Not loaded: the first picture waits")


def test_refusals_say_what_to_do(browser: Browser, server: Server) -> None:
    server.process.guard(api_keys="reader:read,boss:admin")
    with opened(browser, server.url, "generate") as page:
        notice = page.locator("#notice")
        expect(notice).to_contain_text("enter yours at the top of the page")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("reader")
        page.keyboard.press("Enter")
        expect(notice).to_be_hidden()
        ask(page, "a cat")
        expect(notice).to_have_text("This API key may not do that: the API key does not have the scope submit")
        check(page)
        page.get_by_role("tab", name="Audits").click()
        expect(notice).to_contain_text("does not have the scope audit")
        page.get_by_label("API key").fill("boss")
        page.keyboard.press("Enter")
        page.get_by_role("tab", name="Generate").click()
        ask(page, "a cat", width=100)
        assert page.locator("#generate [name=width]").evaluate("field => field.validity.stepMismatch")


@pytest.mark.slow
def test_a_tiny_model_of_the_real_pipeline_paints(browser: Browser, tiny_studio: TinyStudios) -> None:
    name = uuid.uuid4().hex

    def made(url: str) -> Studio:
        stores = (MemoryBlobStore(f"memory:{name}", url), MemoryJobStore(f"memory:{name}"))
        return tiny_studio("tiny-sdxl", stores=stores, name=name, public_url=url)

    with in_thread(made) as (url, _), opened(browser, url, "generate") as page:
        ask(page, "a forest", width=64, count=2)
        expect(page.locator("#generate figure")).to_contain_text(["Seed 7", "Seed 8"], timeout=60_000)


# Jobs


@pytest.mark.parametrize(("size", "colours"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_a_dead_letter_is_replayed(browser: Browser, server: Server, size: tuple[int, int], colours: Any) -> None:
    with opened(browser, server.url, "jobs", size, color_scheme=colours) as page:
        cards = page.locator("#jobs li")
        expect(page.locator("#jobs")).to_contain_text("No jobs yet.")
        page.get_by_role("tab", name="Generate").click()
        failed(page, server, why=f"{EVIL} is blank")
        ask(page, "a forest", count=2)
        expect(page.locator("#generate figure")).to_have_count(2)
        page.get_by_role("tab", name="Jobs").click()
        expect(cards).to_have_count(2)
        expect(cards.first).to_contain_text("cost 0.")
        expect(cards.first.get_by_role("img")).to_have_count(2)
        expect(cards.last).to_contain_text(f"blank_image: {EVIL} is blank")
        expect(cards.last).to_contain_text("dead letter")
        expect(cards.last.locator(".prompt")).to_have_text(EVIL)
        check(page)
        page.get_by_label("State").select_option("failed")
        expect(cards).to_have_count(1)
        cards.get_by_role("button", name="Replay").press("Enter")
        expect(page.locator("#jobs")).to_contain_text("No job is failed.")
        page.get_by_label("State").select_option("")
        expect(cards.locator(".badge")).to_have_text(["succeeded", "succeeded"])
        cards.last.get_by_role("button", name="Open").click()
        expect(page.locator("#generate h2").first).to_have_text(EVIL)
        expect(page.locator("#generate figure")).to_contain_text("Seed 7")


def test_a_job_is_canceled_from_the_list(browser: Browser, server: Server) -> None:
    server.cards.is_held = True
    for _ in range(12):
        server.do(server.studio.api.post({"type": "generate", "prompt": "a cat", "steps": 1}, Caller()))
    with opened(browser, server.url, "jobs") as page:
        cards = page.locator("#jobs li")
        expect(cards).to_have_count(12)
        newest = cards.first.locator("code").inner_text()
        cards.first.get_by_role("button", name="Cancel").press("Enter")
        expect(cards.first.locator(".badge")).to_have_text("canceled")
        assert cards.first.locator("code").inner_text() == newest
        expect(cards.first.get_by_role("button", name="Open")).to_be_focused()


# Audits


@pytest.mark.parametrize(("size", "colours"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_an_audit_of_an_edits_session_is_started_and_its_report_opened(
    browser: Browser, server: Server, size: tuple[int, int], colours: Any
) -> None:
    edit = {"type": "inpaint", "image": jpeg(photo()), "mask": png(line_mask()), "prompt": "a wall"}
    job, _ = server.do(server.studio.api.post(edit, Caller()))
    with opened(browser, server.url, "jobs", size, color_scheme=colours) as page:
        page.locator("#jobs li").get_by_role("button", name="Audit").click()
        form, runs = page.locator("#audits form"), page.locator("#audits li")
        expect(page.get_by_text("No audits yet")).to_be_visible()
        expect(form.get_by_label("Session")).to_have_value(job.id)
        check(page)
        form.get_by_label("Guidance scales").fill("2, 4.5")
        form.get_by_role("button", name="Start").press("Enter")
        expect(runs.locator(".badge")).to_have_text("running")
        expect(runs).to_contain_text(f"session api/{job.id}")
        check(page)
        server.audits.may_end.set()
        expect(runs.locator(".badge")).to_have_text("succeeded")
        expect(runs).to_contain_text("2 succeeded")
        link = runs.get_by_role("link", name="Report of audit-")
        assert "/blobs/" in str(link.get_attribute("href"))
        check(page)
    (run,) = server.do(server.audits.store.list(5))
    assert (run.request.matrix.variants, run.request.matrix.guidance_scales) == (("telea",), (2.0, 4.5))


def test_a_session_without_a_photo_is_refused_and_a_running_audit_is_canceled(browser: Browser, server: Server) -> None:
    edit = {"type": "inpaint", "image": jpeg(photo()), "mask": png(line_mask())}
    job, _ = server.do(server.studio.api.post(edit, Caller()))
    with opened(browser, server.url, "edit", job=job.id) as page:
        form, runs = page.locator("#audits form"), page.locator("#audits li")
        page.get_by_role("tab", name="Audits").click()
        expect(form.get_by_label("Session")).to_have_value(job.id)
        form.get_by_label("User").fill(USER)
        form.get_by_label("Session").fill(SESSION)
        form.get_by_role("button", name="Start").click()
        expect(page.locator("#notice")).to_contain_text("is not in the blob store")
        for name, data in (("original.jpg", jpeg(photo())), ("mask_auto.png", png(line_mask()))):
            server.do(server.studio.blobs.put(session_path(USER, SESSION, name), data, content_type="image/png"))
        form.get_by_role("button", name="Start").click()
        expect(runs.locator(".badge")).to_have_text("running")
        runs.get_by_role("button", name="Cancel").click()
        expect(runs.locator(".badge")).to_have_text("canceled")
        expect(runs).to_contain_text("canceled by a user")

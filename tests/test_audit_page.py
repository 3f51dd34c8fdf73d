"""report.html in a browser: the sheet, the slider, the links, a phone, no scripts, and nothing fetched."""

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.sync_api import Browser, Page, expect

from serve_app.audit.record import Audit, CellResult
from serve_app.http.blobs import HEADERS, PAGE_POLICY
from serve_app.parameters import AuditRequest, Matrix

from . import audited
from .browser import Watched, served

pytestmark = pytest.mark.emulator

#: What the app sends with a report.
HEADERS = {**HEADERS, "Content-Security-Policy": PAGE_POLICY}
REQUEST = audited.REQUEST
DESKTOP, PHONE = (1280, 900), (390, 844)


def write(file: Path, run: Audit, results: list[CellResult], size: tuple[int, int] = (640, 480)) -> str:
    """The report's page as a file, and its address. In a thread, because Playwright's loop may run in this one."""

    async def made() -> str:
        return await (await audited.published(run, results, size)).read(run, "report.html")

    with ThreadPoolExecutor(1) as pool:
        file.write_text(pool.submit(lambda: asyncio.run(made())).result())
    return file.as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page whose fourth cell failed."""
    results = audited.results()
    results[3] = audited.failed(REQUEST, results[3].cell, "<b>CUDA</b> out of memory")
    run = audited.audit(status="incomplete")
    return write(tmp_path_factory.mktemp("page") / "report.html", run, results)


@contextmanager
def opened(browser: Browser, address: str, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[Page]:
    """The page, which may complain of nothing and fetch nothing."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    page = context.new_page()
    watched = Watched(page)
    page.goto(address)
    yield page
    assert watched.complaints == []
    assert watched.fetched == [address]
    context.close()


def overflow_px(page: Page) -> int:
    found: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return found


def at_percent(page: Page) -> float:
    """How much of the original the dialog shows, by where its line is."""
    line, box = page.locator("#compare .line").bounding_box(), page.locator("#compare").bounding_box()
    assert line is not None and box is not None
    return 100 * (line["x"] + line["width"] / 2 - box["x"]) / box["width"]


def test_every_cell_is_in_its_place(browser: Browser, address: str) -> None:
    matrix = REQUEST.matrix
    with opened(browser, address) as page:
        sheet = page.locator("table.sheet")
        expect(sheet).to_have_count(1)
        heads = [text.split()[-1] for text in sheet.locator("thead th").all_inner_texts()]
        assert heads == ["2", "4", "10", "20", "30"]
        rows = sheet.locator("tbody tr")
        assert [text.split()[0] for text in rows.locator("th").all_inner_texts()] == list(matrix.variants)
        for down, variant in enumerate(matrix.variants):
            ids = [place.get_attribute("id") for place in rows.nth(down).locator("td").all()]
            assert ids == [f"cell-{variant}_gs{guidance}" for guidance in heads]
        alts = [shot.get_attribute("alt") for shot in sheet.locator("img").all()]
        assert len(alts) == len(matrix.cells()) - 1
        assert alts[0] == "Painted with Q4_0, guidance 2"


def test_a_failed_cell_says_so_where_its_picture_would_be(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        place = page.locator("#cell-Q4_0_gs20")
        expect(place).to_contain_text("Failed")
        expect(place).to_contain_text("<b>CUDA</b> out of memory")
        expect(place.locator("img, b")).to_have_count(0)


def test_the_recommended_cell_is_marked(browser: Browser, address: str) -> None:
    chosen = audited.audit().recommended
    assert chosen is not None
    with opened(browser, address) as page:
        name = f"{chosen.variant}_gs{chosen.guidance_scale:g}"
        expect(page.locator(".place.chosen")).to_have_attribute("id", f"cell-{name}")
        expect(page.locator("#results-table tr.chosen")).to_have_attribute("data-cell", name)


def test_the_divider_follows_mouse_and_keyboard(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        page.locator("#cell-Q5_K_S_gs10 a.shot").click()
        expect(page.locator("#viewer")).to_be_visible()
        assert at_percent(page) == pytest.approx(50, abs=0.5)

        page.keyboard.press("ArrowRight")
        assert at_percent(page) == pytest.approx(51, abs=0.5)
        page.keyboard.press("Home")
        assert at_percent(page) == pytest.approx(0, abs=0.5)

        box = page.locator("#compare").bounding_box()
        assert box is not None
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.2, y)
        page.mouse.down()
        assert at_percent(page) == pytest.approx(20, abs=1)
        page.mouse.move(box["x"] + box["width"] * 0.75, y, steps=3)
        page.mouse.up()
        assert at_percent(page) == pytest.approx(75, abs=1)
        page.mouse.move(box["x"] + box["width"] * 0.1, y)
        assert at_percent(page) == pytest.approx(75, abs=1)
        clip = page.locator("#compare .before").evaluate("image => getComputedStyle(image).clipPath")
        assert clip == "inset(0px 25% 0px 0px)"


def test_a_finger_moves_the_divider(browser: Browser, address: str) -> None:
    with opened(browser, address, PHONE, has_touch=True, is_mobile=True) as page:
        page.locator("a.shot").first.tap()
        box = page.locator("#compare").bounding_box()
        assert box is not None
        page.touchscreen.tap(box["x"] + box["width"] * 0.3, box["y"] + 20)
        assert at_percent(page) == pytest.approx(30, abs=1)


def test_the_dialog_goes_from_picture_to_picture_and_closes(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        first = page.locator("a.shot").first
        first.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#viewer-label")).to_have_text("Q4_0, guidance 2")
        page.get_by_role("button", name="Next").click()
        expect(page.locator("#viewer-label")).to_have_text("Q4_0, guidance 4")
        second = page.locator("a.shot").nth(1)
        assert page.locator("#full").get_attribute("href") == second.get_attribute("href")
        painted, wanted = page.locator("#compare .painted"), second.locator("img")
        assert painted.get_attribute("src") == wanted.get_attribute("src")
        page.get_by_role("button", name="Previous").click()
        page.get_by_role("button", name="Previous").click()
        expect(page.locator("#viewer-label")).to_have_text("Q8_0, guidance 30")
        page.keyboard.press("Escape")
        expect(page.locator("#viewer")).to_be_hidden()
        expect(first).to_be_focused()


def test_links_are_signed_and_expire_when_the_page_says(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        links = page.locator("a[href]")
        claims = {}
        for link in links.all():
            href = link.get_attribute("href") or ""
            assert link.get_attribute("rel") == "noreferrer"
            assert link.get_attribute("target") == "_blank"
            claim = jwt.decode(href.rpartition("/")[2], options={"verify_signature": False})
            claims[claim["sub"]] = claim["exp"]
        names = {REQUEST.matrix.name(cell) for cell in REQUEST.matrix.cells()} - {"Q4_0_gs20"}
        files = {"REPORT.md", "results.json", "results.csv"}
        assert set(claims) == {f"audit/audit-1a2b3c4d/{name}" for name in files | {f"{name}.png" for name in names}}
        assert len(set(claims.values())) <= 2  # signed within two seconds
        said = page.locator("footer time").get_attribute("datetime")
        assert said == (audited.NOW + timedelta(hours=72)).isoformat()


def test_nothing_is_fetched_through_a_server_that_forbids_it(browser: Browser, address: str) -> None:
    data = Path(address.removeprefix("file://")).read_bytes()
    with served(data, HEADERS) as (url, asked), opened(browser, url) as page:
        page.locator("a.shot").first.click()
        page.keyboard.press("End")
        assert at_percent(page) == pytest.approx(100, abs=0.5)
        assert asked == ["/report"]


def test_what_somebody_slips_into_the_page_does_not_run(browser: Browser, address: str, tmp_path: Path) -> None:
    page_file = tmp_path / "report.html"
    slipped = '<script>document.title = "run"</script><img src="https://example.org/x.png"></main>'
    page_file.write_text(Path(address.removeprefix("file://")).read_text().replace("</main>", slipped))
    page = browser.new_page()
    page.goto(page_file.as_uri())
    assert page.title() == "Audit audit-1a2b3c4d"
    assert page.locator('img[src^="https"]').evaluate("image => image.naturalWidth") == 0
    page.close()


def test_without_scripts_tables_and_pictures_are_there(browser: Browser, address: str) -> None:
    with opened(browser, address, java_script_enabled=False) as page:
        for picture in page.locator("table.sheet img").all():
            expect(picture).to_be_visible()
        expect(page.locator("#results-table tbody tr")).to_have_count(15)
        expect(page.locator("#results-table")).to_be_visible()
        expect(page.locator("#timings-chart")).to_be_visible()
        expect(page.locator("#viewer")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 640)])
def test_only_tables_scroll_sideways(browser: Browser, address: str, size: tuple[int, int], scheme: str) -> None:
    with opened(browser, address, size, color_scheme=scheme) as page:
        assert overflow_px(page) == 0
        page.locator("a.shot").first.click()
        assert overflow_px(page) == 0
        viewer = page.locator("#viewer").bounding_box()
        assert viewer is not None
        assert viewer["x"] >= 0 and viewer["x"] + viewer["width"] <= size[0]
        assert viewer["y"] >= 0 and viewer["y"] + viewer["height"] <= size[1]


def test_charts_have_a_mark_for_each_cell(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        painted = {REQUEST.matrix.name(cell) for cell in REQUEST.matrix.cells()} - {"Q4_0_gs20"}
        for chart in ("#timings-chart", "#scatter-chart"):
            marks = page.locator(f"{chart} .mark").all()
            assert {mark.get_attribute("data-cell") for mark in marks} == painted
        front = {mark.get_attribute("data-cell") for mark in page.locator("#scatter-chart .pareto").all()}
        choice = audited.audit().recommended
        assert choice is not None and front == set(choice.pareto)
        across = {n: page.locator(f'#timings-chart [data-cell="{n}"] use').bounding_box() for n in painted}
        slow, fast = across["Q8_0_gs2"], across["Q4_0_gs2"]
        assert slow is not None and fast is not None and slow["x"] > fast["x"]


@pytest.mark.parametrize("width", [360, 390])
@pytest.mark.parametrize("worse", [0.4, 2e-3, 8e-5, 3e-6])
def test_a_phone_shows_charts_to_the_last_digit(browser: Browser, tmp_path: Path, width: int, worse: float) -> None:
    """However alike the pictures are: the more, the longer the numbers at the axis."""
    results = audited.results()
    for n, result in enumerate(results):
        if result.compared and result.compared.ssim is not None:
            nearer = result.compared.model_copy(update={"ssim": 1 - worse * (n + 1) / len(results)})
            results[n] = result.model_copy(update={"compared": nearer})
    with opened(browser, write(tmp_path / "report.html", audited.audit(), results), (width, 740)) as page:
        for chart in page.locator(".chart > svg").all():
            frame = chart.bounding_box()
            assert frame is not None
            for text in chart.locator("text").all():
                box = text.bounding_box()
                assert box is not None
                assert frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]


def test_further_axes_are_further_sheets_and_hostile_words_stay_words(browser: Browser, tmp_path: Path) -> None:
    prompts = ("</script><script>alert(1)</script>", "two\n\nlines & \"quotes\" <img src=x onerror='alert(1)'>")
    matrix = Matrix(variants=("A" * 64, "b"), guidance_scales=(2.5,), steps=(4, 8), prompts=prompts)
    request = AuditRequest(user_id="u", session_id="s", matrix=matrix)
    run, results = audited.audit(request), audited.results(request)
    with opened(browser, write(tmp_path / "report.html", run, results), PHONE) as page:
        titles = page.locator("section[aria-labelledby=sheet] h3").all_inner_texts()
        assert titles == [f"{steps} steps, prompt p{p}" for steps in (4, 8) for p in (1, 2)]
        expect(page.locator("table.sheet td.place")).to_have_count(8)
        said = page.locator(".prompts li").all_inner_texts()
        assert [re.sub(r"\s+", " ", text) for text in said] == [
            f"p{n} {' '.join(prompt.split())}" for n, prompt in enumerate(prompts, 1)
        ]
        expect(page.locator("script")).to_have_count(1)
        assert overflow_px(page) == 0

"""What a report says: that its figures agree with the run's record, and that nobody's words can break it."""

import csv
import io
import json
import logging
import random
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import jwt
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from serve_app.adapters.memory import MemoryBlobStore
from serve_app.audit.files import RunFiles, read_cells
from serve_app.audit.metrics import METRICS
from serve_app.audit.recommend import recommend
from serve_app.audit.record import Audit, AuditStatus, CellResult, Compared, folder
from serve_app.audit.report import chart
from serve_app.audit.report.columns import columns
from serve_app.audit.report.pictures import SIDE_PX, Frame, shown_box, tinted
from serve_app.audit.report.publish import _TEMPLATES, publish
from serve_app.audit.report.results import replicas
from serve_app.errors import StaleClaim, StoreUnavailable
from serve_app.models import Box
from serve_app.parameters import PROMPTS, AuditRequest, Matrix

from . import audited
from .audit_jobs import always
from .pictures import blank, noise, spot

REQUEST = audited.REQUEST
HOSTILE = "a|b `c` **d** \\ <img src=x> &amp; [e](http://f.example) _g_ ~~h~~ $i$ @all\n\n# j\n- k\u2028| l |"


class Tables(HTMLParser):
    """The texts of every table's cells, row by row, and the tags that were met."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self._is_open = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._is_open = True

    def handle_endtag(self, tag: str) -> None:
        self._is_open = self._is_open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_open:
            self.tables[-1][-1][-1] += data

    def results(self) -> list[dict[str, str]]:
        """By the column's head, of the table of results."""
        (head, *rows) = next(table for table in self.tables if table[0][:2] == ["Variant", "Guidance"])
        return [dict(zip(head, map(str.strip, row), strict=True)) for row in rows]


def rendered(markdown: str) -> Tables:
    return Tables(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def head(column: Any) -> str:
    return f"{column.head} {column.unit}".strip()


def with_a_failure(message: str = "the device had no memory left") -> list[CellResult]:
    results = audited.results()
    results[7] = audited.failed(REQUEST, results[7].cell, message)
    return results


# -- figures


@pytest.mark.slow
async def test_every_figure_agrees_with_the_stored_cells() -> None:
    run, results = audited.audit(), with_a_failure()
    report = audited.Published()
    files = RunFiles(report.blobs, run.id, always)
    for result in results:
        await files.keep_cell(result)
    photo, mask = audited.photo_and_mask()
    await report.keep(results, photo, mask)
    await report.publish(run, results, photo, mask)

    cells = json.loads(await report.read(run, "results.json"))["cells"]
    in_markdown = rendered(await report.read(run, "REPORT.md")).results()
    in_page = Tables(await report.read(run, "report.html")).results()
    in_table = list(csv.DictReader(io.StringIO(await report.read(run, "results.csv"))))
    stored = await read_cells(report.blobs, run.id)
    names = [REQUEST.matrix.name(cell) for cell in REQUEST.matrix.cells()]
    assert [cell["name"] for cell in cells] == [row["name"] for row in in_table] == names
    assert len(in_markdown) == len(in_page) == len(names)
    for name, cell, row, said, shown in zip(names, cells, in_table, in_markdown, in_page, strict=True):
        result = stored[name]
        assert said["Variant"] == shown["Variant"] == cell["variant"] == result.cell.variant
        assert float(said["Guidance"]) == float(shown["Guidance"]) == cell["guidance"] == result.cell.guidance_scale
        for column in columns(results):
            assert said[head(column)] == shown[head(column)] == column.text(result)
        for figure in ("wall_s", "gpu_ms", "first_wall_s", "steps_per_s", "tflop_per_s", "cost", "peak_bytes"):
            assert cell[figure] == getattr(result, figure)
            assert row[figure] == ("" if cell[figure] is None else str(cell[figure]))
        for figure in Compared.model_fields:
            assert cell[figure] == getattr(result.compared, figure, None)
        assert cell["trials"] == [trial.wall_s for trial in result.trials]
        if result.trials:
            assert cell["stages"] == result.trials[1].stages


def test_a_figure_is_shown_with_its_decimals_and_a_missing_one_as_missing() -> None:
    (result,) = audited.results(AuditRequest(user_id="u", session_id="s", matrix=Matrix(
        variants=("Q4_0",), guidance_scales=(2.0,))))  # fmt: skip
    texts = {column.head: column.text(result) for column in columns([result])}
    assert texts["Wall"] == "11.68"
    assert texts["First"] == "16.00"
    assert texts["GPU"] == "11366.1"
    assert texts["Seam edge"] == "1.04"
    on_cpu = result.model_copy(update={"gpu_ms": None})
    assert {column.head: column.text(on_cpu) for column in columns([on_cpu])}["GPU"] == "\N{EN DASH}"


def test_every_metric_has_a_column_where_it_was_measured() -> None:
    measured = Compared.model_validate({metric.name: 1 for metric in METRICS})
    results = [audited.results()[0].model_copy(update={"compared": measured})]
    assert {metric.title for metric in METRICS} <= {column.head for column in columns(results)}


@pytest.mark.slow
async def test_what_is_not_finite_is_null() -> None:
    results = audited.results()
    assert results[0].compared is not None
    strange = results[0].compared.model_copy(update={"psnr_db": float("inf"), "ssim": float("nan")})
    results[0] = results[0].model_copy(update={"compared": strange})
    run = audited.audit()
    text = await (await audited.published(run, results)).read(run, "results.json")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["cells"][0]["psnr_db"] is content["cells"][0]["ssim"] is None


@pytest.mark.slow
async def test_results_json_says_which_run_it_is_and_what_came_of_it() -> None:
    run = audited.audit()
    content = json.loads(await (await audited.published(run, audited.results())).read(run, "results.json"))
    assert content["run_id"] == run.id
    assert (content["user_id"], content["session_id"]) == ("user-1", "session-1")
    assert content["status"] == "succeeded"
    assert content["reference"] == "Q8_0"
    assert Matrix.model_validate_json(json.dumps(content["matrix"])) == REQUEST.matrix
    assert content["versions"] == {"diffusers": "0.42.1", "torch": "2.13.0"}
    assert content["memory"] == [reading.model_dump() for reading in run.memory]
    assert content["compile"] == {"Q4_0": json.loads(run.compile[0].model_dump_json())}
    assert run.recommended is not None
    assert content["recommended"] == json.loads(run.recommended.model_dump_json())


@pytest.mark.slow
async def test_cells_come_in_the_matrix_s_order_and_those_never_painted_have_their_place() -> None:
    results = audited.results()[:-2]
    random.Random(1).shuffle(results)
    run = audited.audit(status="canceled")
    report = await audited.published(run, results)
    names = [cell["name"] for cell in json.loads(await report.read(run, "results.json"))["cells"]]
    assert names == [REQUEST.matrix.name(cell) for cell in REQUEST.matrix.cells()][:-2]
    page = await report.read(run, "report.html")
    assert page.count("Not painted") == 2
    assert "13 of 15" in page


async def test_a_run_in_which_nothing_succeeded_on_a_cpu() -> None:
    results = [audited.failed(REQUEST, cell) for cell in REQUEST.matrix.cells()]
    run = audited.audit(status="incomplete", gpu=None, sm=None, recommended=None, compile=(), memory=())
    report = await audited.published(run, results)
    markdown, page = await report.read(run, "REPORT.md"), await report.read(run, "report.html")
    assert "| GPU | CPU |" in markdown and "| Compute capability | N/A |" in markdown
    assert "No cell succeeded" in page and "no cell succeeded" in markdown
    assert "<dd>CPU</dd>" in page and "<dd>N/A</dd>" in page
    assert "timings-chart" not in page


def canceled_early() -> tuple[Audit, list[CellResult]]:
    bare = [result.model_copy(update={"compared": None}) for result in audited.results()[:3]]
    return audited.audit(status="canceled", recommended=None), bare


@pytest.mark.slow
async def test_why_nothing_is_recommended_is_said_as_it_is() -> None:
    failed = [audited.failed(REQUEST, cell) for cell in REQUEST.matrix.cells()[:1]]
    run, bare = canceled_early()
    for results, status, why in (
        (bare, AuditStatus.CANCELED, "the run was canceled, and its pictures were not all compared."),
        (failed, AuditStatus.CANCELED, "no cell succeeded."),
        (
            audited.results(),
            AuditStatus.SUCCEEDED,
            "nothing could be recommended, for a reason that the job's log gives.",
        ),
    ):
        asked = run.model_copy(update={"status": status})
        report = await audited.published(asked, results)
        assert f"None: {why}" in (await report.read(run, "REPORT.md")).replace("&#39;", "'")
        page = (await report.read(run, "report.html")).replace("&#39;", "'")
        assert f"<p>{why.capitalize()}</p>" in page


@pytest.mark.slow
async def test_the_report_says_what_compiling_and_memory_came_to() -> None:
    reasons = ("call to print()", "data dependent jump")
    verdict = audited.audit().compile[0].model_copy(update={"viable": False, "break_reasons": reasons})
    run = audited.audit(compile=(verdict,))
    report = await audited.published(run, audited.results())
    for name in ("REPORT.md", "report.html"):
        text = await report.read(run, name)
        assert all(reason in text for reason in reasons)
        tables = (rendered if name == "REPORT.md" else Tables)(text).tables
        (compiled,) = [table for table in tables if "Graphs" in table[0]]
        assert [cell.strip() for cell in compiled[1]][2:] == [
            *("1", "0", "0.4961", "0.3412", "1.45", "61.2", "0.0039", "15 edits")
        ]
        (readings,) = [table for table in tables if table[0][0] == "After"]
        assert [cell.strip() for cell in readings[2]] == ["Q4_0", "0.43", "0.41", "38.4"]
        (peaks,) = [table for table in tables if any("Peak allocated" in cell for cell in table[0])]
        assert [cell.strip() for cell in peaks[3]] == ["Q8_0", "16.35", "17.35"]


@pytest.mark.slow
async def test_the_report_says_which_share_of_their_time_replicas_idled() -> None:
    over = {"finished_at": audited.NOW + timedelta(seconds=400)}
    results, run = [result.model_copy(update=over) for result in with_a_failure()], audited.audit()
    report = await audited.published(run, results)
    content = json.loads(await report.read(run, "results.json"))["replicas"]
    assert [(one["variant"], one["cells"], one["held_s"]) for one in content] == [
        ("Q4_0", 5, 400),
        ("Q5_K_S", 4, 400),
        ("Q8_0", 5, 400),
    ]
    for one in content:
        painted_s = sum(trial.wall_s for r in results if r.cell.variant == one["variant"] for trial in r.trials)
        assert one["painted_s"] == pytest.approx(painted_s)
        assert one["idle_share"] == pytest.approx(1 - painted_s / 400)
    for name in ("REPORT.md", "report.html"):
        tables = (rendered if name == "REPORT.md" else Tables)(await report.read(run, name)).tables
        (table,) = [table for table in tables if "Cells" in table[0]]
        assert [row[-1].strip() for row in table[1:]] == [f"{100 * one['idle_share']:.0f}" for one in content]


def test_a_replica_of_which_no_time_is_known_has_no_idle_share() -> None:
    (one,) = replicas(audited.results()[:1])
    assert one["held_s"] == 0 and one["idle_share"] is None


@pytest.mark.slow
async def test_cells_whose_paintings_differ_are_named() -> None:
    run, results = audited.audit(), audited.results()
    told = {
        name: await (await audited.published(run, results)).read(run, name) for name in ("REPORT.md", "report.html")
    }
    assert all("Not the same bytes" not in text for text in told.values())
    for n in (4, 9):
        results[n] = results[n].model_copy(update={"repeats": False})
    report = await audited.published(run, results)
    assert "Not the same bytes in each painting: `Q4_0_gs30`, `Q5_K_S_gs30`." in await report.read(run, "REPORT.md")
    assert '<dd class="varying">Q4_0_gs30, Q5_K_S_gs30</dd>' in await report.read(run, "report.html")


@pytest.mark.slow
async def test_markdown_leaves_room_for_notes_and_states_the_rules() -> None:
    run = audited.audit()
    markdown = await (await audited.published(run, audited.results())).read(run, "REPORT.md")
    assert markdown.rpartition("\n## ")[2].startswith("Notes\n")
    assert run.recommended is not None
    assert f"**`{run.recommended.variant}`, guidance" in markdown
    for n, reason in enumerate(run.recommended.reasons, 1):
        assert f"{n}. {reason[:30]}" in markdown


@pytest.mark.slow
async def test_a_resumed_run_s_time_is_said_to_count_from_its_first_attempt() -> None:
    for attempt, said in ((1, "30 min 48 s after it began"), (2, "30 min 48 s after its first attempt began")):
        run = audited.audit(attempt=attempt)
        report = await audited.published(run, audited.results())
        assert said in await report.read(run, "REPORT.md")
        assert ("<dt>Took</dt>" in await report.read(run, "report.html")) == (attempt == 1)


async def test_a_prompt_of_the_services_own_goes_by_its_name() -> None:
    matrix = Matrix(variants=("Q4_0", "Q8_0"), guidance_scales=(2.0,), prompts=("plain", "sand"))
    assert matrix.prompts == (PROMPTS["plain"], "sand")
    request = AuditRequest(user_id="u", session_id="s", matrix=matrix)
    run = audited.audit(request)
    report = await audited.published(run, audited.results(request))
    markdown, page = [await report.read(run, name) for name in ("REPORT.md", "report.html")]
    for rows in (rendered(markdown).results(), Tables(page).results()):
        assert [row["Prompt"] for row in rows] == ["plain", "p2"] * 2
    assert f"Prompt p1 plain: {PROMPTS['plain']}\n\nPrompt p2: sand" in markdown
    for said in (f"<strong>p1 plain</strong> {PROMPTS['plain']}", "<strong>p2</strong> sand", ">prompt plain</h3>"):
        assert said in page
    with pytest.raises(ValueError, match="prompts: a value is given twice"):
        Matrix(prompts=("plain", PROMPTS["plain"]))


# -- words of others


def shape(markdown: str) -> list[str]:
    return rendered(markdown).tags


async def test_hostile_words_do_not_break_the_markdown() -> None:
    def told(words: str) -> tuple[Audit, list[CellResult]]:
        matrix = Matrix(variants=("Q4_0", "Q8_0"), guidance_scales=(2.0,), prompts=(words, "sand"))
        request = AuditRequest(user_id="u", session_id="s", matrix=matrix)
        results = audited.results(request)
        results[0] = audited.failed(request, results[0].cell, words)
        verdict = audited.audit().compile[0].model_copy(update={"verdict": words, "break_reasons": (words,)})
        return audited.audit(request, compile=(verdict,), gpu=words), results

    texts = []
    for words in ("harmless", HOSTILE):
        run, results = told(words)
        texts.append(await (await audited.published(run, results)).read(run, "REPORT.md"))
    assert shape(texts[1]) == shape(texts[0])
    # The GPU, in a table.
    assert " ".join(HOSTILE.split()) in {cell for row in rendered(texts[1]).tables[0] for cell in row}


@given(st.text(alphabet="ab1 \n\t|`*_\\[]()<>&;#!~$@:/.-+='\"{}www\u2028"))
def test_text_is_only_text_in_markdown(text: str) -> None:
    cell = _TEMPLATES.filters["text"](text)
    parsed = rendered(f"| head |\n|---|\n| x{cell}x |\n")
    assert parsed.tables == [[["head"], [f"x{' '.join(text.split())}x"]]]
    assert parsed.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n=", " \n\t@", "\u00a0=", "\uff1d"])
async def test_no_word_becomes_a_spreadsheet_s_formula(start: str) -> None:
    words = f"{start}HYPERLINK(\"http://f.example\",'x')\n,;"
    matrix = Matrix(variants=("Q4_0", "Q8_0"), guidance_scales=(2.0,), prompts=(words,))
    request = AuditRequest(user_id="u", session_id="s", matrix=matrix)
    results = [audited.failed(request, matrix.cells()[0], words), audited.results(request)[1]]
    run = audited.audit(request)
    report = await audited.published(run, results)
    rows = list(csv.DictReader(io.StringIO(await report.read(run, "results.csv"), newline="")))
    assert [row["prompt"] for row in rows] == [f"'{words}"] * 2
    assert rows[0]["error_message"] == f"'{words}"
    assert float(rows[1]["wall_s"]) == results[1].wall_s


# -- links


@pytest.mark.slow
async def test_links_last_as_long_as_asked_and_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    run = audited.audit(REQUEST.model_copy(update={"link_hours": 1.5}))
    report = await audited.published(run, audited.results())
    content = json.loads(await report.read(run, "results.json"))
    markdown = await report.read(run, "REPORT.md")
    page = await report.read(run, "report.html")
    for cell in content["cells"]:
        url = cell["signed_url"]
        token = url.rpartition("/")[2]
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims["sub"] == cell["image_path"] == f"{folder(run.id)}/{cell['name']}.png"
        assert f"({url})" in markdown and f'href="{url}"' in page
        assert token not in caplog.text
    assert f"{audited.NOW + timedelta(hours=1.5):%Y-%m-%d %H:%M} UTC" in markdown
    assert "The report of" in caplog.text


async def test_no_link_ends_before_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long signing takes, and what follows it."""
    run, report = audited.audit(), audited.Published()
    now = audited.NOW

    async def slow(path: str, *, expires_s: int) -> str:
        nonlocal now
        now += timedelta(hours=1)
        return f"https://links.example/{path}?until={(now + timedelta(seconds=expires_s)).timestamp():.0f}"

    monkeypatch.setattr(report.blobs, "link", slow)
    photo, mask = audited.photo_and_mask()
    await publish(run, audited.results(), photo, mask, blobs=report.blobs, confirm=report.confirm, clock=lambda: now)
    said = re.search(r'<time datetime="([^"]+)"', await report.read(run, "report.html"))
    ends = re.findall(r"\?until=(\d+)", await report.read(run, "results.json"))
    assert said and len(ends) == 15
    assert datetime.fromisoformat(said[1]).timestamp() <= min(map(int, ends))


# -- pictures


@pytest.mark.slow
async def test_a_picture_that_cannot_be_read_back_is_named_and_stops_nothing() -> None:
    run, results = audited.audit(), audited.results()
    report, (photo, mask) = audited.Published(), audited.photo_and_mask()
    await report.keep(results, photo, mask)
    gone, damaged, small = (result.image_path or "" for result in results[:3])
    await report.blobs.delete(gone)
    await report.blobs.put(damaged, b"no picture", content_type="image/png")
    await report.blobs.put(small, audited.png(photo[:-1]), content_type="image/png")
    await report.publish(run, results, photo, mask)

    page, markdown = await report.read(run, "report.html"), await report.read(run, "REPORT.md")
    for text, name in ((page, "<strong>{}</strong>"), (markdown, "`{}`: ")):
        for result in results[:3]:
            assert name.format(result.name) in text.replace("\n", " ")
    assert "does not exist" in page and "the picture is 240x179, the photo 240x180" in page
    assert page.count("Picture unreadable") == 3
    assert page.count("data:image/jpeg") == len(results) - 3 + 2


async def test_a_claim_that_ends_meanwhile_leaves_the_rest_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    run, results, report = audited.audit(), audited.results(), audited.Published()
    held = iter([None, None])

    async def confirm() -> None:
        if next(held, "over"):
            raise StaleClaim("the claim is over")

    monkeypatch.setattr(report, "confirm", confirm)
    with pytest.raises(StaleClaim):
        await report.publish(run, results, *audited.photo_and_mask())
    written = [info.path async for info in report.blobs.list(f"audit/{run.id}")]
    assert written == [f"audit/{run.id}/results.csv", f"audit/{run.id}/results.json"]


async def test_a_store_that_is_away_is_said_to_be_away() -> None:
    class Away(MemoryBlobStore):
        async def get(self, path: str, *, max_bytes: int) -> Any:
            raise StoreUnavailable("connection refused")

    run, results, report = audited.audit(), audited.results(), audited.Published()
    report.blobs = Away()
    with pytest.raises(StoreUnavailable):
        await report.publish(run, results, *audited.photo_and_mask())


def test_what_is_shown_lies_round_the_mask() -> None:
    mask = blank(1000, 800)
    mask[300:360, 100:220] = 255
    assert shown_box(mask) == Box(x0=60, y0=260, x1=260, y1=400)
    assert shown_box(spot(1000, 800, 0, 790, 10)) == Box(x0=0, y0=786, x1=14, y1=800)
    assert shown_box(blank(1000, 800)) == Box(x0=0, y0=0, x1=1000, y1=800)


@pytest.mark.parametrize("cells", [1, 15, 60, 500])
def test_a_page_s_pictures_stay_within_its_size(cells: int) -> None:
    photo, mask = noise(1500, 1200), blank(1500, 1200)
    mask[100:1100, 100:1400] = 255
    frame = Frame(photo, mask, cells)
    shown = frame.show(photo)
    assert max(shown.width, shown.height) <= SIDE_PX
    assert len(shown.uri) * (cells + 2) < 8_000_000
    if cells <= 15:
        assert max(shown.width, shown.height) == SIDE_PX


def test_small_pictures_are_not_enlarged() -> None:
    photo = noise(90, 60)
    shown = Frame(photo, blank(90, 60), 15).show(photo)
    assert (shown.width, shown.height) == (90, 60)


def test_the_mask_is_shown_over_the_photo() -> None:
    photo, mask = noise(20, 10), spot(20, 10, 3, 4, 2)
    before = photo.copy()
    marked = tinted(photo, mask)
    assert np.array_equal(photo, before)
    assert np.array_equal(marked[mask == 0], photo[mask == 0])
    assert not np.array_equal(marked[mask != 0], photo[mask != 0])


# -- charts


def cells_of(seconds: Sequence[float]) -> tuple[AuditRequest, list[CellResult]]:
    guidances = tuple(float(n) for n in range(len(seconds)))
    request = AuditRequest(user_id="u", session_id="s", matrix=Matrix(variants=("a",), guidance_scales=guidances))
    cells = zip(audited.results(request), seconds, strict=True)
    return request, [result.model_copy(update={"wall_s": wall_s}) for result, wall_s in cells]


def texts(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter("text"))


def marks(svg: str) -> dict[str, tuple[float, float]]:
    """Where each cell's mark is, in the chart's pixels."""
    found = {}
    for mark in ElementTree.fromstring(svg).iterfind(".//*[@data-cell]"):
        (use,) = mark.iter("use")
        found[mark.attrib["data-cell"]] = float(use.attrib["x"]), float(use.attrib["y"])
    return found


def fronts(svg: str) -> list[list[tuple[float, float]]]:
    """The corners of each line along a front."""
    lines = [path.attrib["d"] for path in ElementTree.fromstring(svg).iterfind(".//*[@class='front']/path")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", line)] for line in lines]


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=12))
def test_marks_lie_on_the_axis_by_their_seconds(seconds: list[float]) -> None:
    request, results = cells_of(seconds)
    drawn = chart.timings(request, results, ())
    assert drawn is not None
    ticks = [(float(text.text or ""), float(text.attrib["x"])) for text in texts(drawn)[:-3]]
    values = [value for value, _ in ticks]
    assert values[0] == 0 and values == sorted(values) and 2 <= len(values) <= 12
    (_, left), (last, right) = ticks[0], ticks[-1]
    found = marks(drawn)
    assert len(found) == len(seconds)
    for result, wall_s in zip(results, seconds, strict=True):
        x, _ = found[result.name]
        assert 0 <= x <= 480
        assert x == pytest.approx(left + wall_s / last * (right - left), abs=0.1)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(-1, 1)), min_size=2, max_size=12))
@example([(1.0, 0.1), (1.0000001, 0.2), (1.0000002, 0.9), (50.0, 0.95)])
@example([(1.0, 0.0), (1.0, 1e-250)])
def test_the_scatter_holds_every_cell_and_its_front_only_climbs(points: list[tuple[float, float]]) -> None:
    request, results = cells_of([seconds for seconds, _ in points])
    matrix = request.matrix.model_copy(update={"variants": ("a", "reference")})
    request = request.model_copy(update={"matrix": matrix})
    compared = results[0].compared
    assert compared is not None
    results = [
        result.model_copy(update={"compared": compared.model_copy(update={"ssim": ssim})})
        for result, (_, ssim) in zip(results, points, strict=True)
    ]
    names = recommend(request, results, {})
    assert names is not None
    drawn = chart.scatter(request, results, (), names.pareto)
    assert drawn is not None
    found = marks(drawn.svg)
    assert len(found) == len(points)
    assert all(0 <= x <= 480 and 0 <= y <= 290 for x, y in found.values())
    for front in fronts(drawn.svg):
        assert any(front[0] == pytest.approx(at, abs=0.01) for at in found.values())
        assert any(front[-1] == pytest.approx(at, abs=0.01) for at in found.values())
        assert all(x <= later_x and y >= later_y for (x, y), (later_x, later_y) in pairwise(front))


@pytest.mark.slow
async def test_each_combination_of_further_axes_has_a_front_of_its_own() -> None:
    matrix = Matrix(variants=("a", "b"), guidance_scales=(2.0,), steps=(4, 28), seeds=(0, 1))
    request = AuditRequest(user_id="u", session_id="s", matrix=matrix)
    results = audited.results(request)
    names = tuple(result.name for result in results if result.cell.seed == 0)
    drawn = chart.scatter(request, results, (), names)
    assert drawn is not None
    assert "<title>a, guidance 2, 4 steps, seed 1: " in drawn.svg
    where, legs = marks(drawn.svg), fronts(drawn.svg)
    for steps, leg in zip((4, 28), legs, strict=True):
        ends = where[f"a_gs2_st{steps}_seed0"], where[f"b_gs2_st{steps}_seed0"]
        (x, y), (later_x, later_y) = ends
        corners = [(x, y), (later_x, y), (later_x, later_y)]
        assert [corner == pytest.approx(at, abs=0.01) for corner, at in zip(leg, corners, strict=True)] == [True] * 3

    choice = audited.audit(request).recommended
    assert choice is not None
    run = audited.audit(request, recommended=choice.model_copy(update={"pareto": names}))
    report = await audited.published(run, results)
    said = "Pareto front (no other cell of the same steps and seed is as fast and as near"
    for name, listed in (("REPORT.md", [f"`{name}`" for name in names]), ("report.html", names)):
        text = await report.read(run, name)
        assert said in text
        assert f": {', '.join(listed)}." in text


def test_the_reference_is_in_the_scatter_as_its_own_equal() -> None:
    drawn = chart.scatter(REQUEST, audited.results(), (), ())
    assert drawn is not None
    found = marks(drawn.svg)
    top = min(y for _, y in found.values())
    (one,) = [text for text in texts(drawn.svg) if text.text == "1.000"]
    assert float(one.attrib["y"]) == pytest.approx(top, abs=8)
    assert {name for name, (_, y) in found.items() if y == top} == {
        f"Q8_0_gs{guidance}" for guidance in (2, 4, 10, 20, 30)
    }


def test_charts_are_drawn_the_same_twice_and_fit_for_a_page_that_forbids_styles() -> None:
    def draw() -> tuple[str, str]:
        drawn, others = chart.timings(REQUEST, audited.results(), ()), chart.scatter(REQUEST, audited.results(), (), ())
        assert drawn is not None and others is not None
        return drawn, others.svg

    assert draw() == draw()
    both = "".join(draw())
    assert "style=" not in both and "<style" not in both and "xmlns" not in both
    ids = re.findall(r' id="([^"]*)"', both)
    assert len(ids) == len(set(ids))
    # Colours are the page's alone.
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'="#m[0-9a-f]+"', "", both))


def test_one_cell_makes_no_scatter() -> None:
    assert chart.scatter(REQUEST, audited.results()[:1], (), ()) is None
    assert chart.timings(REQUEST, [], ()) is None

"""A run's report: REPORT.md and report.html for people, results.json and results.csv for programs.

Everything is made from the cells as they are stored; nothing is measured or chosen here.
"""

import base64
import hashlib
import html
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...blobs import BlobStore
from ...clock import Clock, utc_now
from ...models import Pixels
from ...parameters import PROMPT_NAMES, plain
from ..record import PAGE, REPORT, RESULTS, TABLE, Audit, AuditStatus, CellResult, folder
from . import chart
from .columns import NONE, axes, columns, gigabytes
from .pictures import Pictures, show_all
from .results import as_csv, as_json, document, joined, replicas
from .sheets import is_recommended, several, shared, sheets

log = logging.getLogger(__name__)

#: In the order they are written: whoever sees the page finds the others.
_CONTENT_TYPES = {RESULTS: "application/json", TABLE: "text/csv", REPORT: "text/markdown", PAGE: "text/html"}
#: What Markdown takes for more than text. As HTML's references it is text, also in a table, where a backslash does not
#: stop a `|`. Addresses would become links.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$@]|_(?![A-Za-z0-9])|(?<![A-Za-z0-9])_|:(?=//)|(?<=www)\.")


async def publish(
    audit: Audit,
    results: Sequence[CellResult],
    photo: Pixels,
    mask: Pixels,
    *,
    blobs: BlobStore,
    confirm: Callable[[], Awaitable[None]],
    clock: Clock = utc_now,
) -> None:
    """Write the four files into the run's folder, over those of an earlier attempt.

    `audit` is the record as it will be once the report is there: over. `photo` is `[height, width, 3]`, `mask`
    `[height, width]`, not 0 where it was edited. A picture that cannot be read back is named in the page. Each
    write awaits `confirm`, as those of RunFiles do. Raises StoreUnavailable.
    """
    # As the store has them, where what is not finite is None, in the matrix's order.
    found = {result.cell: CellResult.model_validate_json(result.model_dump_json()) for result in results}
    results = [found[cell] for cell in audit.request.matrix.cells() if cell in found]
    # Before the first is signed: none ends earlier than the report says.
    expires_at = clock() + timedelta(seconds=audit.request.link_s)
    paths = [path for result in results if (path := result.image_path)]
    files = {name: f"{folder(audit.id)}/{name}" for name in _CONTENT_TYPES}
    signed = {path: await blobs.link(path, expires_s=audit.request.link_s) for path in (*paths, *files.values())}

    content = document(audit, results, signed)
    pictures = await show_all(blobs, photo, mask, results)
    said = _said(audit, results, pictures, signed, expires_at)
    written = {RESULTS: as_json(content), TABLE: as_csv(content), REPORT: markdown(said), PAGE: page(said)}
    for name, content_type in _CONTENT_TYPES.items():
        await confirm()
        await blobs.put(files[name], written[name], content_type=content_type)
    log.info("The report of %s is written", audit.id, extra={"action": "audit_reported", "run_id": audit.id})


def markdown(said: Mapping[str, Any]) -> bytes:
    return _TEMPLATES.get_template("REPORT.md.j2").render(said).encode()


def page(said: Mapping[str, Any]) -> bytes:
    loader = _TEMPLATES.loader
    assert loader is not None
    style, script = (loader.get_source(_TEMPLATES, name)[0] for name in ("report.css", "report.js"))
    hashes = {"style_hash": _csp_hash(style), "script_hash": _csp_hash(script)}
    template = _TEMPLATES.get_template("report.html.j2")
    return template.render(said, style=Markup(style), script=Markup(script), **hashes).encode()


def _said(
    audit: Audit, results: Sequence[CellResult], pictures: Pictures, signed: Mapping[str, str], expires_at: datetime
) -> dict[str, Any]:
    """What both templates are given."""
    request, choice = audit.request, audit.recommended
    chosen = {result.name for result in results if is_recommended(result.cell, choice)}
    return {
        "audit": audit,
        "request": request,
        "results": results,
        "varying": [result.name for result in results if result.repeats is False],
        "failed": [result for result in results if result.status == "failed"],
        "gpu": audit.gpu or _among(result.gpu for result in results),
        "sm": audit.sm or _among(result.sm for result in results),
        "axes": axes(request),
        "columns": columns(results),
        "sheets": sheets(request, results, choice),
        "shared": shared(request.matrix),
        "several": several(request.matrix),
        "prompts": [(request.matrix.number(one), PROMPT_NAMES.get(one), one) for one in request.matrix.prompts],
        "chosen": chosen,
        "unchosen": _unchosen(audit, results),
        "timings": chart.timings(request, results, chosen),
        "scatter": chart.scatter(request, results, chosen, choice.pareto if choice else ()),
        "pictures": pictures,
        "peaks": _peaks(audit, results),
        "replicas": replicas(results),
        "versions": joined([joined(r.versions for r in results), joined(r.revisions for r in results)]),
        "signed": signed,
        "files": {name: signed[f"{folder(audit.id)}/{name}"] for name in _CONTENT_TYPES},
        "expires_at": expires_at,
        "absent": NONE,
    }


def _unchosen(audit: Audit, results: Sequence[CellResult]) -> str:
    """Why nothing is recommended, where that is so."""
    painted = [result for result in results if result.status == "succeeded"]
    if not painted:
        return "no cell succeeded"
    if audit.status == AuditStatus.CANCELED and not all(result.compared for result in painted):
        return "the run was canceled, and its pictures were not all compared"
    return "nothing could be recommended, for a reason that the job's log gives"


def _peaks(audit: Audit, results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """The most device memory that each variant's cells took, GB; None where there is no GPU."""

    def most(variant: str, name: str) -> float | None:
        own = [getattr(result, name) for result in results if result.cell.variant == variant]
        return gigabytes(max((count for count in own if count is not None), default=None))

    return [
        {"variant": name, "allocated": most(name, "peak_bytes"), "reserved": most(name, "reserved_bytes")}
        for name in audit.request.matrix.variants
    ]


def _among(values: Any) -> str:
    return ", ".join(sorted(set(values))) or NONE


def _moment(moment: datetime | None) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment else NONE


def _figure(value: float | None, decimals: int = 2) -> str:
    return NONE if value is None else f"{value:.{decimals}f}"


def _percent(share: float | None) -> str:
    return _figure(share if share is None else 100 * share, 0)


def _duration(audit: Audit) -> str:
    if audit.started_at is None or audit.finished_at is None:
        return NONE
    minutes, seconds = divmod(round((audit.finished_at - audit.started_at).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _as_text(text: object) -> Markup:
    """For Markdown: text on one line that is nothing but text."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return Markup(_MARKDOWN.sub(lambda mark: f"&#{ord(mark[0])};", line))


def _csp_hash(source: str) -> str:
    """What Content-Security-Policy knows an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


_TEMPLATES = Environment(
    loader=PackageLoader("serve_app.audit.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"text": _as_text, "moment": _moment, "figure": _figure, "duration": _duration, "plain": plain}
_TEMPLATES.filters |= {"gigabytes": gigabytes, "percent": _percent}

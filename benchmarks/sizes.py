"""How large the code is: lines by area, how long its functions are, and the modules that one message meets.

Lines are those of the source files, blank lines and docstrings included. A private function's callers are the places
in its own package that name it. The message is really worked on, from a memory broker to a stored picture, with
OpenCV's Telea in this process; Ray's part (ingress, router, replica) comes on top and is named apart.

    python -m benchmarks.sizes            # tables; the last line is one JSON object
"""

import ast
import asyncio
import io
import json
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
#: Lines that an area may have; None where nothing is said.
AREAS = {"product": 12_700, "audits": 5_600, "benchmarks": None, "tests": None}
#: What a message meets where painting is another process's.
OVER_RAY = (
    "deployments.ingress",
    "deployments.remote",
    "deployments.readiness",
    "deployments.replica",
    "deployments.inpainter",
)


@dataclass(frozen=True, slots=True)
class Function:
    module: str
    name: str
    lines: int


def area_of(file: Path) -> str:
    package, *rest = file.relative_to(ROOT).parts
    if package == "tests":
        return "tests"
    is_audit = any(part.startswith("audit") for part in rest) or file.stem == "launcher"
    return "audits" if is_audit else "benchmarks" if package == "benchmarks" else "product"


def sources() -> list[Path]:
    return sorted(
        file
        for package in ("serve_app", "deployments", "benchmarks", "tests")
        for file in (ROOT / package).rglob("*.py")
    )


def lines_by_area() -> dict[str, int]:
    lines: Counter[str] = Counter()
    for file in sources():
        lines[area_of(file)] += len(file.read_text().splitlines())
    return {area: lines[area] for area in AREAS}


def functions(files: Sequence[Path]) -> list[Function]:
    return [
        Function(str(file.relative_to(ROOT)), node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def callers(files: Sequence[Path]) -> Counter[str]:
    """How often each name is read, in whatever module."""
    named: Counter[str] = Counter()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                named[node.id] += 1
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                named[node.attr] += 1
    return named


def shape(files: Sequence[Path]) -> dict[str, Any]:
    """Of the functions in the product and the audits."""
    found = functions(files)
    lengths = sorted(function.lines for function in found)
    private = [f for f in found if f.name.startswith("_") and not f.name.startswith("__")]
    named = callers(files)
    longest = max(found, key=lambda function: function.lines)
    return {
        "functions": len(found),
        "median_lines": statistics.median(lengths),
        "p90_lines": lengths[len(lengths) * 9 // 10],
        "max_lines": longest.lines,
        "longest": f"{longest.module}:{longest.name}",
        "private_functions": len(private),
        "with_one_caller": round(sum(named[f.name] == 1 for f in private) / len(private), 3),
    }


# -- a message's way


def modules_of_a_message() -> list[str]:
    """Modules of ours in which a function ran, in the order in which the message came to them."""
    met: dict[str, None] = {}

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("serve_app") and frame.f_code.co_name != "<module>":
            met.setdefault(name)

    threading.setprofile(note)
    try:
        asyncio.run(_edit(note))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(met)


async def _edit(note: Any) -> None:
    from serve_app import adapters
    from serve_app.adapters.image_links import ImageLinks
    from serve_app.adapters.webhooks import Webhooks
    from serve_app.edit.job import Editor
    from serve_app.edit.session import session_path
    from serve_app.engine.families import create
    from serve_app.engine.painting import LocalModel
    from serve_app.jobs.notifications import Notifier
    from serve_app.jobs.record import State
    from serve_app.jobs.worker import Worker
    from serve_app.settings import Inference, Secrets, Settings

    settings = Settings(blobs="memory:s", jobs="memory:s", messages={"url": "memory:s"}, variants={"telea": {}})
    store, blobs = adapters.job_store(settings.jobs), adapters.blob_store(settings.blobs)
    publisher = adapters.publisher(settings.messages)
    webhooks = Webhooks(settings.webhooks, Secrets())
    engine = create("telea", settings.variant("telea"), None, settings.variants["telea"])
    models = {"telea": LocalModel("telea", engine)}
    editor = Editor(
        blobs=blobs,
        models=models,
        prompts=_NoPrompts(),
        settings=settings,
        defaults=lambda: Inference(variant="telea"),
        links=ImageLinks(settings),
    )
    notifier = Notifier(
        kinds=[editor],
        job_store=store,
        mirror=store,
        publisher=publisher,
        webhooks=webhooks,
        settings=settings,
    )
    worker = Worker(
        kinds=[editor],
        job_store=store,
        mirror=store,
        publisher=publisher,
        notifier=notifier,
        webhooks=webhooks,
        models=models,
        settings=settings,
    )
    for name, data in (("original.jpg", _jpeg()), ("mask_auto.png", _png())):
        await blobs.put(session_path("u", "s", name), data, content_type="image/png")
    source = adapters.message_source(settings.messages, 1)
    running = asyncio.create_task(source.run(worker.work))
    await publisher.publish("sessions", b'{"userId": "u", "sessionId": "s"}', {})
    sys.setprofile(note)
    async with asyncio.timeout(30):
        while not [job for job in await store.list() if job.status is State.SUCCEEDED and not job.owed]:
            await asyncio.sleep(0.01)
    sys.setprofile(None)
    await source.close(grace_s=1)
    await running
    worker.close()


class _NoPrompts:
    """Telea takes none."""

    async def encode(self, _variant: str, _prompt: str) -> None:
        return None


def _jpeg() -> bytes:
    return _encoded(np.full((96, 128, 3), 120, np.uint8), "JPEG")


def _png() -> bytes:
    mask = np.zeros((96, 128), np.uint8)
    mask[40:48, 30:90] = 255
    return _encoded(mask, "PNG")


def _encoded(pixels: Any, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    areas = Table("area", "lines", "at most", title="Source lines")
    for area, count in found["lines"].items():
        areas.add_row(area, f"{count:,}", f"{AREAS[area]:,}" if AREAS[area] else "")
    yield areas
    facts = Table("functions of product and audits", "", title="Functions")
    for name, value in found["shape"].items():
        facts.add_row(name.replace("_", " "), str(value))
    yield facts


def main() -> None:
    code = [file for file in sources() if area_of(file) in ("product", "audits")]
    way = modules_of_a_message()
    found = {"lines": lines_by_area(), "shape": shape(code), "message": way}
    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in _tables(found):
        console.print(table)
    console.print(f"A message meets {len(way)} modules, and {len(OVER_RAY)} more over Ray: {', '.join(OVER_RAY)}")
    console.print(", ".join(name.removeprefix("serve_app.") for name in way))
    print(json.dumps(found | {"message": len(way), "over_ray": len(OVER_RAY)}))


if __name__ == "__main__":
    main()

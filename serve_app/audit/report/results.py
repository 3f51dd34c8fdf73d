"""results.json and results.csv: a run's figures for programs, unrounded, as its cells are stored."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from ...models import Trial
from ..record import Audit, CellResult, Compared

#: A spreadsheet takes text that begins with one of these for a formula, also behind white space (OWASP, "CSV
#: Injection", with the full-width forms).
_FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def document(audit: Audit, results: Sequence[CellResult], signed: Mapping[str, str]) -> dict[str, Any]:
    """What results.json holds, as JSON types. `signed`: links by blob path."""
    record = json.loads(audit.model_dump_json())
    request = record["request"]
    return {
        "run_id": audit.id,
        **{name: request[name] for name in ("user_id", "session_id")},
        **{name: record[name] for name in ("created_at", "started_at", "finished_at", "status", "gpu", "sm")},
        "reference": audit.request.reference_variant,
        "matrix": request["matrix"],
        "versions": joined(result.versions for result in results),
        "revisions": joined(result.revisions for result in results),
        "memory": record["memory"],
        "replicas": replicas(results),
        "cells": [_cell(result, signed) for result in results],
        "compile": {verdict["variant"]: verdict for verdict in record["compile"]},
        "recommended": record["recommended"],
    }


def replicas(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """By replica: seconds from its first cell's beginning to its last one's end (`held_s`), those in which it painted
    cells, and the share of the others (`idle_share`), in which it waited for cells or painted for jobs."""
    painted: dict[str, list[CellResult]] = {}
    for result in results:
        if result.replica and result.started_at and result.finished_at:
            painted.setdefault(result.replica, []).append(result)
    return [_replica(name, own) for name, own in painted.items()]


def _replica(name: str, own: Sequence[CellResult]) -> dict[str, Any]:
    began = min(result.started_at for result in own if result.started_at)
    held_s = (max(result.finished_at for result in own if result.finished_at) - began).total_seconds()
    painted_s = sum(trial.wall_s for result in own for trial in result.trials)
    return {
        "variant": own[0].cell.variant,
        "replica": name,
        "cells": len(own),
        "painted_s": painted_s,
        "held_s": held_s,
        # A cell's beginning is known by its first progress, a little later.
        "idle_share": max(0.0, 1 - painted_s / held_s) if held_s > 0 else None,
    }


def as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False).encode()


def as_csv(content: Mapping[str, Any]) -> bytes:
    """A line for each cell, below a header."""
    rows = [_row(cell) for cell in content["cells"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def warm_stages(trials: Sequence[Trial]) -> dict[str, float]:
    """Medians of the warm paintings, seconds by stage."""
    warm = trials[1:]
    return {stage: median(trial.stages[stage] for trial in warm) for stage in (warm[0].stages if warm else ())}


def joined(mappings: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """All of them in one; what differs between them stands side by side."""
    values: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            values.setdefault(name, {})[value] = None
    return {name: ", ".join(found) for name, found in sorted(values.items())}


def _cell(result: CellResult, signed: Mapping[str, str]) -> dict[str, Any]:
    # Through JSON, as the store writes it.
    record = json.loads(result.model_dump_json(exclude={"versions", "revisions"}))
    cell, compared, trials = (record.pop(name) for name in ("cell", "compared", "trials"))
    return {
        **{"guidance" if name == "guidance_scale" else name: value for name, value in cell.items()},
        **record,
        "stages": warm_stages(result.trials),
        "trials": [trial["wall_s"] for trial in trials],
        **(compared or dict.fromkeys(Compared.model_fields)),
        "signed_url": signed.get(result.image_path or ""),
    }


def _row(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, and harmless in a spreadsheet."""
    nested = {"error", "stages", "trials"}
    fault = cell["error"] or {"code": None, "message": None}
    flat = {
        **{name: value for name, value in cell.items() if name not in nested},
        **{f"error_{name}": value for name, value in fault.items()},
        **cell["stages"],
        "trials": " ".join(map(str, cell["trials"])),
    }
    for name, value in flat.items():
        if isinstance(value, str) and value.lstrip().startswith(_FORMULA_STARTS):
            flat[name] = f"'{value}"
    return flat

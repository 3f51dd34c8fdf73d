"""Contact sheets: variants down, guidance scales across, and a sheet for each combination of the further axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ...parameters import AuditRequest, Cell, Matrix, plain
from ..record import CellResult, Recommendation


@dataclass(frozen=True, slots=True)
class SheetCell:
    name: str
    cell: Cell
    #: None: the cell was not painted.
    result: CellResult | None
    is_recommended: bool


@dataclass(frozen=True, slots=True)
class Sheet:
    #: The further axes' values, those of several; empty where there is one sheet.
    title: str
    #: By variant, guidance scale by guidance scale.
    rows: Mapping[str, Sequence[SheetCell]]


def sheets(request: AuditRequest, results: Sequence[CellResult], recommended: Recommendation | None) -> list[Sheet]:
    matrix, found = request.matrix, {result.name: result for result in results}

    def sheet_cell(cell: Cell) -> SheetCell:
        name = matrix.name(cell)
        return SheetCell(name, cell, found.get(name), is_recommended(cell, recommended))

    made = []
    axes = (matrix.steps, matrix.seeds, matrix.prompts, matrix.crops, matrix.mask_grows)
    for steps, seed, prompt, crop, mask_grow in product(*axes):
        further = {"steps": steps, "seed": seed, "prompt": prompt, "crop": crop, "mask_grow": mask_grow}
        rows = {
            variant: [
                sheet_cell(Cell.model_validate({"variant": variant, "guidance_scale": guidance, **further}))
                for guidance in matrix.guidance_scales
            ]
            for variant in matrix.variants
        }
        made.append(Sheet(title(matrix, rows[matrix.variants[0]][0].cell), rows))
    return made


def is_recommended(cell: Cell, recommended: Recommendation | None) -> bool:
    if recommended is None:
        return False
    chosen = recommended.variant, recommended.guidance_scale, recommended.steps
    return chosen == (cell.variant, cell.guidance_scale, cell.steps)


def shared(matrix: Matrix) -> str:
    """The further axes' values that all cells have, but the prompt."""
    cell = matrix.cells()[0]
    return ", ".join(
        text for values, text in _further(matrix, cell) if len(values) == 1 and values is not matrix.prompts
    )


def title(matrix: Matrix, cell: Cell) -> str:
    """The cell's values of the further axes, those of several; empty where there are none."""
    return ", ".join(text for values, text in _further(matrix, cell) if len(values) > 1)


def several(matrix: Matrix) -> str:
    """The further axes of several values, by name: "steps and seed"; empty where there are none."""
    axes = {
        "steps": matrix.steps,
        "seed": matrix.seeds,
        "prompt": matrix.prompts,
        "crop": matrix.crops,
        "mask growth": matrix.mask_grows,
    }
    names = [name for name, values in axes.items() if len(values) > 1]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _further(matrix: Matrix, cell: Cell) -> Sequence[tuple[Sequence[object], str]]:
    return (
        (matrix.steps, f"{cell.steps} steps"),
        (matrix.seeds, f"seed {cell.seed}"),
        (matrix.prompts, f"prompt {matrix.short(cell.prompt)}"),
        (matrix.crops, f"crop {cell.crop}"),
        (matrix.mask_grows, f"mask grown by {plain(cell.mask_grow)}"),
    )

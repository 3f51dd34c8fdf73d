"""Which settings an audit would choose, by rules that it states with their figures.

Pictures that put the object back count in no rule, except where all do; a variant with more than half of them is not
chosen.

1. The variant: the smallest whose pictures are, in the mean over its cells, within the quality budget of the
   reference's. The reference is within it.
2. Its guidance scale: the one whose seam is least visible, in the mean over its cells; of several that are about equal
   the nearest to the official one.
3. Its steps, at that guidance scale: the fewest whose seam is about as invisible as that of any.

Beside them the Pareto front of seconds and quality, within each combination of the further axes. What failed is
in no mean, and is named; what has too few cells left is not judged by them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log2
from statistics import fmean

from ..edit import quality
from ..parameters import AuditRequest, Cell, QualityBudget, plain
from .record import CellResult, Recommendation

#: Of FLUX.1-Fill. Source: its model card.
OFFICIAL_GUIDANCE = 30.0
#: A colour difference that is just noticeable, CIE76. Source: Mahy et al., as in `metrics.seam_colour_shift`.
JUST_NOTICEABLE = 2.3
#: Seams whose visibility differs by no more are about equal: a tenth of a just noticeable colour difference.
TIE = 0.1

_LIMITS = (
    "What no figure here can judge: whether what was painted is right for the place. Likeness to the reference says "
    "how much a smaller variant changes the picture, not which of the two is better; the seam says how well the edge "
    "joins, not what is within it; and it is one session. Look at the pictures before you decide."
)


def recommend(
    request: AuditRequest,
    results: Sequence[CellResult],
    sizes: Mapping[str, float],
    most_put_back: float = quality.PUT_BACK,
) -> Recommendation | None:
    """The settings to use, and each rule that led there; None where nothing succeeded.

    A cell with more than `most_put_back` puts the object back. `sizes`: GB of each variant's weights; a variant that is
    not there counts as larger than all that are. Of equal sizes the one the matrix names first is the smaller.
    """
    painted = [result for result in results if result.status == "succeeded"]
    if not painted:
        return None
    of_reference = len(_of(painted, request.reference_variant))
    judged, few_of_variants = _enough(painted, lambda result: result.cell.variant, of_reference)
    judged, put_back = _removing(judged, most_put_back)
    variant, variant_reason = _variant(request, judged, sizes)
    of_variant, few_of_guidance = _enough(
        _of(judged, variant), lambda result: f"guidance scale {plain(result.cell.guidance_scale)}"
    )
    guidance, guidance_reason = _guidance(of_variant)
    at_guidance = [result for result in of_variant if result.cell.guidance_scale == guidance]
    of_steps, few_of_steps = _enough(at_guidance, lambda result: f"{result.cell.steps} steps")
    steps, steps_reason = _steps(of_steps)
    chosen = (variant_reason, put_back, few_of_variants, guidance_reason, few_of_guidance, steps_reason, few_of_steps)
    alike = [r for r in judged if (r.cell.guidance_scale, r.cell.steps) == (guidance, steps)]
    beaten = _beaten(request, alike, variant, _smallest_first(request, judged, sizes))
    reasons = (*chosen, beaten, _failed(results), _changed_outside(painted), _LIMITS)
    return Recommendation(
        variant=variant,
        guidance_scale=guidance,
        steps=steps,
        reasons=tuple(reason for reason in reasons if reason),
        pareto=pareto(request, painted),
    )


def visibility(result: CellResult) -> float | None:
    """Of the picture's seam: 0 is invisible, 1 is a just noticeable shift of colour, or gradients of twice or half
    those beyond the seam. The sum of both; None where the mask has no seam.

    The weights are this project's: both parts count their unit of visibility as 1.
    """
    compared = result.compared
    if compared is None or compared.seam_gradient_ratio is None or compared.seam_colour_shift is None:
        return None
    return abs(log2(compared.seam_gradient_ratio)) + compared.seam_colour_shift / JUST_NOTICEABLE


def combination(cell: Cell) -> tuple[int, str, float, str, int]:
    """The axes that seconds and nearness depend on by themselves: fewer steps are always faster, and pictures are
    compared at the same axes only. Cells of one combination differ by variant and guidance scale."""
    return cell.steps, cell.crop, cell.mask_grow, cell.prompt, cell.seed


def pareto(request: AuditRequest, painted: Sequence[CellResult]) -> tuple[str, ...]:
    """Names of the cells that no other of their combination beats: no other is as fast and as near to the reference,
    and faster or nearer. Nearness is SSIM, 1 for the reference; a cell without seconds or SSIM is not among them.

    Combination by combination in the matrix's order, fastest first within each.
    """
    # Seconds, nearness below 0, name.
    points: dict[tuple[int, str, float, str, int], list[tuple[float, float, str]]] = {
        combination(cell): [] for cell in request.matrix.cells()
    }
    for result in painted:
        if point := _point(request, result):
            points[combination(result.cell)].append((point[0], -point[1], result.name))
    front = []
    for of in points.values():
        best = inf, inf
        for seconds, distance, name in sorted(of):
            # Sorted by seconds, so only what is nearer than all before it is not beaten; or its equal in both.
            if distance < best[1] or (seconds, distance) == best:
                best = seconds, distance
                front.append(name)
    return tuple(front)


@dataclass(frozen=True, slots=True)
class _Likeness:
    """A variant's means over those of its cells that could be compared with the reference."""

    cells: int
    ssim: float
    psnr_db: float

    def is_within(self, budget: QualityBudget) -> bool:
        return self.ssim >= budget.min_ssim and self.psnr_db >= budget.min_psnr_db

    def __str__(self) -> str:
        return f"SSIM {self.ssim:.4f}, PSNR {self.psnr_db:.1f} dB over {self.cells} cell{'s' * (self.cells != 1)}"


def _enough(
    cells: Sequence[CellResult], name: Callable[[CellResult], str], full: int = 0
) -> tuple[list[CellResult], str]:
    """Those whose name has at least half as many cells as `full`, or, where that is 0, as the name that has the most;
    and which have not. A mean over a few of the cells is one over others than the rest were judged by."""
    counts = Counter(map(name, cells))
    full = full or max(counts.values())
    few = [f"{found} ({count} of {full})" for found, count in counts.items() if 2 * count < full]
    reason = f"Not counted, because less than half as many cells are judged: {', '.join(few)}." if few else ""
    return [result for result in cells if 2 * counts[name(result)] >= full], reason


def _removing(cells: Sequence[CellResult], most_put_back: float) -> tuple[list[CellResult], str]:
    """Those that do not put the object back, of variants of which at least half do not, and which do; all of them where
    no variant is left."""
    back = [cell for cell in cells if cell.compared and (cell.compared.put_back or 0.0) > most_put_back]
    if not back:
        return list(cells), ""
    counts, of_back = Counter(cell.cell.variant for cell in cells), Counter(cell.cell.variant for cell in back)
    out = {variant for variant, count in of_back.items() if 2 * count > counts[variant]}
    said = ", ".join(f"{variant} in {count} of {counts[variant]} cells" for variant, count in of_back.items())
    rule = f"The object is put back (put_back above {most_put_back:g}) by {said}"
    names = {cell.name for cell in back}
    left = [cell for cell in cells if cell.name not in names and cell.cell.variant not in out]
    if not left:
        return list(cells), f"{rule}: none of the variants removes it, and the rules were applied to all of them."
    more = f", and {', '.join(sorted(out))} is not recommended" if out else ""
    return left, f"{rule}: those cells are not judged{more}."


def _of(cells: Sequence[CellResult], variant: str) -> list[CellResult]:
    return [result for result in cells if result.cell.variant == variant]


def _variant(request: AuditRequest, painted: Sequence[CellResult], sizes: Mapping[str, float]) -> tuple[str, str]:
    """The first rule's choice, and why."""
    reference, smallest_first = request.reference_variant, _smallest_first(request, painted, sizes)
    if reference not in smallest_first:
        return smallest_first[-1], (
            f"Variant {smallest_first[-1]}: the largest with enough cells. Of the reference {reference} none are "
            "judged, so no other can be shown to be within the quality budget."
        )
    found = {name: _likeness(_of(painted, name)) for name in smallest_first}
    within = [name for name, likeness in found.items() if likeness and likeness.is_within(request.budget)]
    chosen = next(name for name in smallest_first if name == reference or name in within)
    gb = {name: f" ({size:.3g} GB)" for name, size in sizes.items()}
    figures = (
        f"{name}{gb.get(name, '')}: {'the reference' if name == reference else found[name] or 'not compared'}"
        for name in smallest_first
    )
    return chosen, (
        f"Variant {chosen}: the smallest within the quality budget, SSIM at least {request.budget.min_ssim:g} and PSNR "
        f"at least {request.budget.min_psnr_db:g} dB against {reference} inside the mask, means over its cells. "
        f"{'; '.join(figures)}."
    )


def _smallest_first(request: AuditRequest, painted: Sequence[CellResult], sizes: Mapping[str, float]) -> Sequence[str]:
    order = request.matrix.variants
    return sorted(
        {result.cell.variant for result in painted}, key=lambda name: (sizes.get(name, inf), order.index(name))
    )


def _likeness(cells: Sequence[CellResult]) -> _Likeness | None:
    pairs = [(result.compared.ssim, result.compared.psnr_db) for result in cells if result.compared]
    known = [(ssim, psnr_db) for ssim, psnr_db in pairs if ssim is not None and psnr_db is not None]
    return _Likeness(len(known), *map(fmean, zip(*known, strict=True))) if known else None


def _guidance(cells: Sequence[CellResult]) -> tuple[float, str]:
    """The second rule's choice among one variant's cells, and why."""
    values = sorted({result.cell.guidance_scale for result in cells})
    if len(values) == 1:
        return values[0], f"Guidance scale {plain(values[0])}: the only one with enough pictures."
    seen = _by_value(cells, lambda result: result.cell.guidance_scale)
    chosen = min(_about_best(seen) or values, key=lambda value: (abs(value - OFFICIAL_GUIDANCE), value))
    official = f"the official {plain(OFFICIAL_GUIDANCE)}"
    if not seen:
        return chosen, f"Guidance scale {plain(chosen)}: the nearest to {official}; no seam was measured."
    return chosen, (
        f"Guidance scale {plain(chosen)}: of those whose seam is the least visible, or within {TIE:g} of it, the "
        f"nearest to {official}. Visibility, |log2 gradient ratio| + colour shift / {JUST_NOTICEABLE:g}, 0 is "
        f"invisible: {_listed(seen)}."
    )


def _steps(cells: Sequence[CellResult]) -> tuple[int, str]:
    """The third rule's choice among the cells of one variant and guidance scale, and why; no reason where there was
    no choice."""
    values = sorted({result.cell.steps for result in cells})
    seen = _by_value(cells, lambda result: result.cell.steps)
    chosen = int(min(_about_best(seen) or values))
    if len(values) == 1:
        return chosen, ""
    if not seen:
        return chosen, f"{chosen} steps: the fewest; no seam was measured."
    return chosen, f"{chosen} steps: the fewest whose seam is within {TIE:g} of the least visible: {_listed(seen)}."


def _beaten(request: AuditRequest, alike: Sequence[CellResult], chosen: str, smallest_first: Sequence[str]) -> str:
    """By which larger variants, where there are such, in seconds and nearness both. `alike`: the cells at the chosen
    guidance scale and steps. In the mean over the combinations that both painted."""
    points: dict[str, dict[tuple[int, str, float, str, int], tuple[float, float]]] = {
        name: {} for name in smallest_first
    }
    for result in alike:
        if point := _point(request, result):
            points[result.cell.variant][combination(result.cell)] = point
    said = []
    for name in smallest_first[smallest_first.index(chosen) + 1 :]:
        if shared := sorted(points[chosen].keys() & points[name].keys()):
            (our_s, ours), (their_s, theirs) = (
                map(fmean, zip(*(points[of][at] for at in shared), strict=True)) for of in (chosen, name)
            )
            if (their_s, theirs) != (our_s, ours) and their_s <= our_s and theirs >= ours:
                said.append(
                    f"{name} is {'faster' if their_s < our_s else 'as fast'} ({their_s:.4g} s against {our_s:.4g} s) "
                    f"and {'nearer' if theirs > ours else 'as near'} to the reference (SSIM {theirs:.4f} against "
                    f"{ours:.4f})"
                )
    return f"{'; '.join(said)}: all that {chosen} can save is memory." if said else ""


def _by_value(cells: Sequence[CellResult], value: Callable[[CellResult], float]) -> dict[float, float]:
    """Mean visibility by an axis's value, ascending; without those that have none."""
    scores: dict[float, list[float]] = {}
    for result in sorted(cells, key=value):
        if (score := visibility(result)) is not None:
            scores.setdefault(value(result), []).append(score)
    return {axis: fmean(of) for axis, of in scores.items()}


def _about_best(seen: Mapping[float, float]) -> list[float]:
    least = min(seen.values(), default=inf)
    return [value for value, score in seen.items() if score <= least + TIE]


def nearness(request: AuditRequest, result: CellResult) -> float | None:
    """SSIM, 1 for the reference."""
    if result.cell.variant == request.reference_variant:
        return 1.0
    return result.compared.ssim if result.compared else None


def _point(request: AuditRequest, result: CellResult) -> tuple[float, float] | None:
    """Seconds and nearness to the reference."""
    near = nearness(request, result)
    return None if result.wall_s is None or near is None else (result.wall_s, near)


def _failed(results: Sequence[CellResult]) -> str:
    failed = [
        f"{result.name} ({result.error.code if result.error else 'no error given'})"
        for result in results
        if result.status == "failed"
    ]
    return f"Failed, and in no mean: {', '.join(failed)}." if failed else ""


def _changed_outside(painted: Sequence[CellResult]) -> str:
    changed = [
        f"{result.name} (by {result.compared.outside_max} of 255)"
        for result in painted
        if result.compared and result.compared.outside_max
    ]
    return f"A defect: the photo was changed outside what may change by {', '.join(changed)}." if changed else ""


def _listed(seen: Mapping[float, float]) -> str:
    return ", ".join(f"{plain(value)}: {score:.2f}" for value, score in seen.items())

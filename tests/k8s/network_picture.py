"""The picture of who talks to whom: docs/images/network.svg."""

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Flow:
    """Each of the sources may connect to each of the targets."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    #: `8265`, `53/UDP`, or `all`.
    ports: str
    #: By the policies' own words.
    why: str


@dataclass(frozen=True)
class Box:
    title: str
    x: int
    y: int
    width: int
    height: int
    #: Actors that it stands for.
    names: frozenset[str]
    is_frame: bool = False

    def edge(self, towards: "Box") -> tuple[float, float]:
        """Where the line between two centres leaves the box."""
        x, y = self.centre
        dx, dy = towards.centre[0] - x, towards.centre[1] - y
        scale = min(self.width / 2 / abs(dx) if dx else 9e9, self.height / 2 / abs(dy) if dy else 9e9)
        return x + dx * scale, y + dy * scale

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


def _box(title: str, x: int, y: int, *names: str, width: int = 180, height: int = 44, is_frame: bool = False) -> Box:
    return Box(title, x, y, width, height, frozenset(names or [title]), is_frame)


RAY, WORKERS = ("head", "cpu", "gpu"), ("cpu", "gpu")
OURS = (*RAY, "redis", "weights", "audit")
#: Frames first, the larger before the smaller.
BOXES = (
    _box("namespace flux-fill", 330, 20, *OURS, "a stranger beside them", width=420, height=530, is_frame=True),
    _box("Ray: all ports among themselves", 350, 120, *RAY, width=380, height=280, is_frame=True),
    _box("workers", 370, 150, *WORKERS, width=340, height=110, is_frame=True),
    _box("cpu", 385, 190, width=140),
    _box("gpu", 555, 190, width=140),
    _box("head", 465, 330),
    _box("redis", 400, 470, width=120),
    _box("audit", 560, 470, width=120),
    _box("weights", 590, 50, width=120),
    _box("the API's pods", 20, 183),
    _box("Prometheus, Google's too", 20, 263, "Prometheus", "Google's Prometheus"),
    _box("KubeRay's operator", 20, 343),
    _box("a stranger: nothing", 20, 470, "a stranger"),
    _box("the internet", 880, 50),
    _box("Google's APIs", 880, 140),
    _box("Google's metadata server", 880, 230, "the metadata server", "GKE's metadata server"),
    _box("the API server", 880, 330),
    _box("DNS", 880, 430, "kube-dns", "the node's DNS cache", "Cloud DNS"),
)


def picture(flows: list[Flow]) -> str:
    lines: dict[tuple[Box, Box], list[str]] = {}
    for source, target, ports in (line for flow in flows for line in _lines(flow)):
        lines.setdefault((source, target), []).append(ports)
    shapes = [*map(_shape, BOXES), *(_arrow(*pair, ", ".join(ports)) for pair, ports in lines.items())]
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 580" font-family="sans-serif" font-size="13">',
            '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="9" refY="4" orient="auto">',
            '<path d="M0,0 L9,4 L0,8 z" fill="#345"/></marker></defs>',
            '<rect width="1080" height="580" fill="white"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def _lines(flow: Flow) -> Iterator[tuple[Box, Box, str]]:
    for source in _boxes(flow.sources):
        for target in _boxes(flow.targets):
            if source != target:
                yield source, target, flow.ports


def _boxes(names: tuple[str, ...]) -> Iterator[Box]:
    """The fewest boxes that stand for the names: a frame for all that are in it, another box for any of its names."""
    left = {*names}
    for box in BOXES:
        if box.names <= left or (not box.is_frame and box.names & left):
            left -= box.names
            yield box


def _shape(box: Box) -> str:
    rect = f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="6"'
    if box.is_frame:
        text = f'<text x="{box.x + 10}" y="{box.y + 20}" fill="#567">{escape(box.title)}</text>'
        return f'{rect} fill="#345" fill-opacity="0.05" stroke="#9ab"/>{text}'
    x, y = box.centre
    text = f'<text x="{x:g}" y="{y + 5:g}" text-anchor="middle">{escape(box.title)}</text>'
    return f'{rect} fill="white" stroke="#345"/>{text}'


def _arrow(source: Box, target: Box, ports: str) -> str:
    (x1, y1), (x2, y2) = source.edge(target), target.edge(source)
    line = f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="#345" marker-end="url(#tip)"/>'
    place = f'x="{(x1 + x2) / 2:.0f}" y="{(y1 + y2) / 2 - 4:.0f}" text-anchor="middle"'
    return f'{line}<text {place} fill="#06c" stroke="white" stroke-width="4" paint-order="stroke">{ports}</text>'

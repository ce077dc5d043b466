"""A small sheet of SVG: boxes, cells, arrows and words, in one style for all figures of the site."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INK = "#1f2933"
SOFT = "#6b7785"
LINE = "#9aa5b1"
ACCENT = "#00796b"
#: From first to last: dark blue over green to yellow, readable on black and in print.
STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def shade(share: float) -> str:
    """A colour for a share from 0 to 1."""
    place = max(0.0, min(1.0, share)) * (len(STOPS) - 1)
    low = min(int(place), len(STOPS) - 2)
    rest = place - low
    mixed = [round(a + (b - a) * rest) for a, b in zip(STOPS[low], STOPS[low + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


@dataclass
class Sheet:
    """Marks on a white sheet; places are pixels from its upper left corner."""

    width: float
    height: float
    title: str
    marks: list[str] = field(default_factory=list)

    def box(
        self, x: float, y: float, w: float, h: float, fill: str = "#ffffff", edge: str = LINE
    ) -> None:
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2" '
            f'fill="{fill}" stroke="{edge}"/>'
        )

    def word(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def words(self, x: float, y: float, lines: Sequence[str], size: float = 12) -> None:
        """Lines below each other."""
        for number, line in enumerate(lines):
            self.word(x, y + number * (size + 4), line, size=size, colour=SOFT)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.marks.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{INK}" '
            'stroke-width="1.5" marker-end="url(#tip)"/>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str = ACCENT) -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.marks.append(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )

    def dot(self, x: float, y: float, r: float = 3, colour: str = ACCENT) -> None:
        self.marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}" fill-opacity="0.7"/>'
        )

    def text(self) -> str:
        """The file."""
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/>'
            "</marker></defs>"
        )
        size = f"{self.width:.0f} {self.height:.0f}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" '
            f'width="{self.width:.0f}" font-family="Helvetica, Arial, sans-serif">'
        )
        sheet = f'<rect width="{self.width:.0f}" height="{self.height:.0f}" fill="#ffffff"/>'
        name = f"<title>{escape(self.title)}</title>"
        return "\n".join([head, name, tip, sheet, *self.marks, "</svg>", ""])

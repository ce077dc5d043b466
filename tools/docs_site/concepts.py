"""The figures of docs/concepts.md.

    python tools/docs_site/concepts.py      # writes docs/pictures/concepts_*.svg; a test says when they are stale

Orders and masks are those of `tessellar.protocol.entities` on the layouts that they are drawn for.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from docs_site.drawing import ACCENT, INK, LINE, SOFT, Sheet, shade  # noqa: E402
from tessellar.protocol.entities import Entities, parse_entities  # noqa: E402
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
GRID = grid_layout(4, 4, Categorical(16))
SCALES = Layout(tuple(Segment((n, n), Categorical(16), f"scale{n}") for n in (1, 2, 4)))
CELL = 20.0


def pipeline() -> str:
    """Image, tokenizer, tokens of a layout, generator with its head, tokens, tokenizer, image."""
    sheet = Sheet(900, 250, "From an image to tokens and back to an image")
    _image(sheet, 16, 70)
    sheet.arrow(108, 112, 138, 112)
    _part(sheet, 142, 84, 84, "tokenizer", "encode")
    sheet.arrow(228, 112, 256, 112)
    _grid(sheet, 262, 72, parse_entities("token", GRID), known=16)
    sheet.word(302, 172, "tokens, in a layout", size=11, colour=SOFT, anchor="middle")
    sheet.arrow(348, 112, 376, 112)
    _part(sheet, 380, 64, 150, "generator", "backbone: what is known")
    sheet.box(392, 118, 126, 30, "#cfe8e4")
    sheet.word(455, 137, "head: the next entity", size=11, anchor="middle")
    sheet.arrow(532, 112, 560, 112)
    _grid(sheet, 566, 72, parse_entities("cell:2", GRID), known=8)
    sheet.word(606, 172, "drawn entity by entity", size=11, colour=SOFT, anchor="middle")
    sheet.arrow(652, 112, 680, 112)
    _part(sheet, 684, 84, 84, "tokenizer", "decode")
    sheet.arrow(770, 112, 798, 112)
    _image(sheet, 804, 70)
    sheet.line([(606, 184), (606, 214), (455, 214)])
    sheet.arrow(455, 214, 455, 172)
    sheet.word(
        470, 232, "decoding: what was drawn is known to the next evaluation", size=11, colour=SOFT
    )
    sheet.word(410, 34, "class or text", size=12)
    sheet.arrow(455, 42, 455, 62)
    return sheet.text()


def _image(sheet: Sheet, x: float, y: float) -> None:
    sheet.box(x, y, 84, 84, "#d7ebf5")
    sheet.dot(x + 62, y + 22, 9, "#f2b705")
    sheet.line(
        [(x + 1, y + 68), (x + 26, y + 38), (x + 46, y + 62), (x + 60, y + 50), (x + 83, y + 70)],
        "#2f7d4f",
    )


def _part(sheet: Sheet, x: float, y: float, wide: float, name: str, does: str) -> None:
    sheet.box(x, y, wide, 176 - 2 * (y - 24), "#eef2f5")
    sheet.word(x + wide / 2, y + 24, name, bold=True, anchor="middle")
    sheet.word(x + wide / 2, y + 42, does, size=11, colour=SOFT, anchor="middle")


def _grid(sheet: Sheet, x: float, y: float, entities: Entities, known: int = 0) -> None:
    """Tokens of a 4 x 4 grid, coloured by entity; from the `known`-th generated one on they are empty."""
    for rank, place in enumerate(entities.order.tolist()):
        number = int(entities.numbers[rank])
        fill = shade(number / max(entities.count - 1, 1)) if rank < known else "#ffffff"
        left, top = x + place % 4 * CELL, y + place // 4 * CELL
        sheet.box(left, top, CELL - 2, CELL - 2, fill)


def orders() -> str:
    """The X of next-X prediction on a grid of 4 x 4 tokens, with who sees whom."""
    names = ("token", "cell:2", "subsample:2", "random:0", "local:4", "image")
    sheet = Sheet(32 + 140 * len(names), 290, "Entities of a grid of 4 x 4 tokens")
    for column, name in enumerate(names):
        entities = parse_entities(name, GRID)
        x = 20 + 140 * column
        count = f"{entities.count} evaluation{'s' if entities.count > 1 else ''}"
        _column(sheet, x, name, entities, count)
    return sheet.text()


def _column(sheet: Sheet, x: float, name: str, entities: Entities, count: str) -> None:
    sheet.word(x, 24, name, bold=True)
    for rank, place in enumerate(entities.order.tolist()):
        number = int(entities.numbers[rank])
        share = number / max(entities.count - 1, 1)
        left, top = x + place % 4 * 26, 36 + place // 4 * 26
        sheet.box(left, top, 24, 24, shade(share))
        colour = "#ffffff" if share < 0.6 else INK
        sheet.word(left + 12, top + 16, str(number + 1), size=11, colour=colour, anchor="middle")
    sheet.word(x, 158, count, size=11, colour=SOFT)
    mask = entities.mask()
    for row in range(16):
        for column in range(16):
            fill = ACCENT if bool(mask[row, column]) else "#ffffff"
            sheet.box(x + column * 6.4, 172 + row * 6.4, 5.4, 5.4, fill, LINE)


def layouts() -> str:
    """Layouts: a grid, a sequence whose prefixes decode, holistic tokens and a grid, scales."""
    sheet = Sheet(820, 170, "Layouts")
    shown = (
        ("grid", ((4, 4),), "LlamaGen, MAR"),
        ("sequence", ((8,),), "TiTok, FlexTok"),
        ("holistic + grid", ((4,), (4, 4)), "Hita"),
        ("scales", ((1, 1), (2, 2), (4, 4)), "VAR"),
    )
    x = 20.0
    for name, shapes, who in shown:
        sheet.word(x, 24, name, bold=True)
        left = x
        for number, shape in enumerate(shapes):
            rows, columns = shape if len(shape) == 2 else (1, *shape)
            for place in range(rows * columns):
                fill = shade(0.25 + 0.3 * number)
                at = left + place % columns * CELL, 36 + place // columns * CELL
                sheet.box(*at, CELL - 2, CELL - 2, fill)
            left += columns * CELL + 10
        sheet.word(x, 140, who, size=11, colour=SOFT)
        x = left + 26
    return sheet.text()


def figures() -> dict[str, str]:
    """Names and contents of the figures."""
    made = {"pipeline": pipeline, "orders": orders, "layouts": layouts}
    return {f"concepts_{name}.svg": make() for name, make in made.items()}


def main() -> None:
    for name, content in figures().items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()

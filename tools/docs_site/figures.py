"""Figures of the papers' pages: of tiny systems that are built and asked, and of the recorded verification."""

from collections.abc import Sequence
from itertools import groupby
from math import log10
from textwrap import wrap

from docs_site.drawing import ACCENT, INK, SOFT, Sheet, shade
from docs_site.parity import Compared
from docs_site.systems import System, Tokens
from tessellar.protocol.layout import Bits, Categorical, Continuous, Factorized, Kind, Layout

CELL = 22.0
LETTER = 6.9  # pixels of a letter at size 12, on average, in a wide font (DejaVu Sans)
#: What an evaluation predicts of the tokens of one entity, by the class of the distribution.
HEADS = {
    "Logits": ("categories", "one draw a token"),
    "FactorLogits": ("sub-tokens in a chain", "each given those before it"),
    "ChannelLogits": ("channels in a chain", "each given those before it"),
    "MaskedBits": ("bits, unmasked in steps", "the surest first"),
    "ImplicitFlow": ("a flow", "noise follows velocities to values"),
    "BinaryFlow": ("a flow to signs", "values end as bits"),
    "ImplicitDiffusion": ("a diffusion", "noise is removed in steps"),
}


def kind_of(kind: Kind) -> str:
    """What one position holds, in words."""
    match kind:
        case Categorical(vocab):
            return f"one of {vocab} codes"
        case Factorized(vocabs):
            return f"{len(vocabs)} indices, of {', '.join(map(str, vocabs))} values"
        case Bits(n):
            return f"{n} bits"
        case Continuous(dim):
            return f"{dim} real numbers"


def cells_of(layout: Layout) -> list[tuple[float, float]]:
    """Upper left corners of all positions, segments side by side, in cells."""
    corners = []
    left = 0.0
    for segment in layout.segments:
        rows, columns = segment.shape if len(segment.shape) == 2 else _folded(segment.length)
        for place in range(segment.length):
            corners.append((left + place % columns, float(place // columns)))
        left += columns + 0.6
    return corners


def _folded(length: int) -> tuple[int, int]:
    """Rows and columns of a sequence: lines of eight."""
    columns = min(length, 8)
    return -(-length // columns), columns


def extent(layout: Layout) -> tuple[float, float]:
    """Width and height of `cells_of`, in pixels."""
    corners = cells_of(layout)
    width = max(x for x, _ in corners) + 1
    height = max(y for _, y in corners) + 1
    return width * CELL, height * CELL


def tokenizer_figure(tokens: Tokens) -> str:
    """Image, tokenizer, layout with the prefix that decodes, image."""
    layout = tokens.layout
    width, height = extent(layout)
    shortest = layout.min_prefix
    prefix = "decoded as a whole" if shortest is None else f"any prefix from {shortest} decodes"
    kinds = list(dict.fromkeys(kind_of(segment.kind) for segment in layout.segments))
    held = f"{layout.length} positions, each {' or '.join(kinds)}"
    said = _wrapped(f"{_segments(layout)}: {held}; {prefix}", 430 + width)
    below = max(height, 88) + 64
    sheet = Sheet(430 + width, below + 8 + 16 * len(said), f"{tokens.name}: {layout}")
    middle = 40 + max(height, 88) / 2
    _image(sheet, 16, middle - 44, tokens.side)
    sheet.arrow(112, middle, 160, middle)
    sheet.word(136, middle - 8, "encode", size=11, colour=SOFT, anchor="middle")
    left = 170
    for place, (x, y) in enumerate(cells_of(layout)):
        inside = shortest is not None and place < shortest
        fill = "#cfe8e4" if inside or shortest is None else "#ffffff"
        _cell(sheet, left, middle - height / 2, x, y, fill, str(place))
    sheet.arrow(left + width + 10, middle, left + width + 58, middle)
    sheet.word(left + width + 34, middle - 8, "decode", size=11, colour=SOFT, anchor="middle")
    _image(sheet, left + width + 68, middle - 44, tokens.side)
    sheet.word(16, 22, tokens.name, bold=True)
    sheet.words(16, below, said)
    return sheet.text()


def _wrapped(text: str, width: float) -> list[str]:
    """Lines of a sheet's width, less its margins."""
    return wrap(text, int((width - 32) / LETTER))


def _image(sheet: Sheet, x: float, y: float, side: int) -> None:
    """An image as a plane of pixels: a sky, a sun, a hill."""
    sheet.box(x, y, 88, 88, "#d7ebf5")
    sheet.dot(x + 66, y + 22, 9, "#f2b705")
    hill = [(x + 1, y + 70), (x + 26, y + 40), (x + 48, y + 64), (x + 62, y + 52), (x + 87, y + 72)]
    sheet.line(hill, "#2f7d4f")
    sheet.word(x + 44, y + 84, f"{side} x {side} x 3", size=10, anchor="middle")


def _cell(sheet: Sheet, left: float, top: float, x: float, y: float, fill: str, text: str) -> None:
    dark = fill.startswith("#") and int(fill[1:3], 16) + int(fill[3:5], 16) < 260
    sheet.box(left + x * CELL, top + y * CELL, CELL - 2, CELL - 2, fill)
    colour = "#ffffff" if dark else INK
    centre = left + x * CELL + CELL / 2 - 1
    sheet.word(centre, top + y * CELL + 14, text, size=10, colour=colour, anchor="middle")


def _segments(layout: Layout) -> str:
    """Segments in words; more than three that are called alike are counted."""
    shapes = [f"{'x'.join(map(str, s.shape))} {s.name}" for s in layout.segments]
    return " + ".join(shapes)


def system_figure(system: System) -> str:
    """The layout with the number of the evaluation that predicts each token, and the head."""
    layout = system.tokens.layout
    width, height = extent(layout)
    tall = max(height, 110)
    said = _wrapped(_order_in_words(system), 470 + width)
    title = f"{system.name}: {len(system.sizes)} evaluations"
    sheet = Sheet(470 + width, tall + 76 + 16 * len(said), title)
    sheet.word(16, 22, f"{system.name}, over the tokens of {system.tokens.name}", bold=True)
    top = 44 + (tall - height) / 2
    _condition(sheet, 16, 44 + tall / 2)
    sheet.arrow(104, 44 + tall / 2, 132, 44 + tall / 2)
    last = max(len(system.sizes) - 1, 1)
    for place, (x, y) in enumerate(cells_of(layout)):
        number = system.entity[place]
        _cell(sheet, 142, top, x, y, shade(number / last), str(number + 1))
    sheet.arrow(142 + width + 6, 44 + tall / 2, 142 + width + 34, 44 + tall / 2)
    _head(sheet, 142 + width + 46, 44 + tall / 2 - 50, system)
    sheet.words(16, tall + 68, said)
    return sheet.text()


def _condition(sheet: Sheet, x: float, y: float) -> None:
    sheet.box(x, y - 18, 84, 36, "#eef2f5")
    sheet.word(x + 42, y + 4, "class or text", size=11, anchor="middle")


def _order_in_words(system: System) -> str:
    sizes = [
        f"{size} token{'s' if size > 1 else ''}" + (f" ({n} times)" if n > 1 else "")
        for size, n in ((size, len(list(group))) for size, group in groupby(system.sizes))
    ]
    order = "drawn anew for each image; here that of seed 0" if system.drawn else "fixed"
    return (
        f"The number is the evaluation that predicts a token: {len(system.sizes)} for "
        f"{sum(system.sizes)} tokens, {', then '.join(sizes)}. The order is {order}."
    )


def _head(sheet: Sheet, x: float, y: float, system: System) -> None:
    """What one evaluation gives for a token of its entity."""
    title, note = HEADS.get(system.head, (system.head, ""))
    sheet.box(x, y, 250, 104, "#fbfcfd")
    sheet.word(x + 10, y + 18, title, bold=True)
    sheet.word(x + 10, y + 94, note, size=11, colour=SOFT)
    left, base = x + 14, y + 74
    kind = system.tokens.layout.segments[0].kind
    if system.head == "Logits":
        probs = system.distribution.probs()
        assert probs is not None
        _bars(sheet, left, base, probs[0, 0].tolist())
    elif system.head in ("FactorLogits", "ChannelLogits"):
        inner = getattr(system.distribution, "inner", system.distribution)
        _chain(sheet, left, base, [f"#{n + 1}" for n in inner.order])
    elif system.head == "MaskedBits":
        count = system.distribution.shape[2]  # type: ignore[attr-defined]
        _bits(sheet, left, base, count)
    else:
        ends = (-1.0, 1.0) if isinstance(kind, Bits) else (-0.8, -0.1, 0.5, 0.9)
        _paths(sheet, left, base, ends, system.head == "ImplicitDiffusion")


def _bars(sheet: Sheet, x: float, base: float, values: Sequence[float]) -> None:
    step = 220 / len(values)
    highest = max(values)
    for number, value in enumerate(values):
        tall = 44 * value / highest
        sheet.box(x + number * step, base - tall, step - 2, tall, ACCENT, ACCENT)


def _chain(sheet: Sheet, x: float, base: float, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        left = x + number * 52
        sheet.box(left, base - 34, 34, 28, "#cfe8e4")
        sheet.word(left + 17, base - 16, name, size=11, anchor="middle")
        if number + 1 < len(names):
            sheet.arrow(left + 35, base - 20, left + 51, base - 20)


def _bits(sheet: Sheet, x: float, base: float, count: int) -> None:
    """Known bits dark, hidden ones white, row below row."""
    step = min(220 / count, 16)
    for row, known in enumerate((0, count // 4, count // 2, count)):
        for number in range(count):
            seen = (number * 7) % count < known
            fill = ACCENT if seen else "#ffffff"
            sheet.box(x + number * step, base - 46 + row * 12, step - 2, 10, fill)


def _paths(sheet: Sheet, x: float, base: float, ends: Sequence[float], curved: bool) -> None:
    """From noise at the left to values at the right."""
    starts = (0.9, -0.4, 0.2, -0.9)
    for number in range(4):
        begin, end = starts[number], ends[number % len(ends)]
        points = []
        for place in range(11):
            share = place / 10
            share = share**2 if curved else share
            height = begin + (end - begin) * share
            points.append((x + place * 20, base - 22 - 20 * height))
        sheet.line(points)
        sheet.dot(*points[0], colour=SOFT)
        sheet.dot(*points[-1])


def parity_figure(system: str, outputs: Sequence[Compared]) -> str:
    """Every recorded output as a mark: its largest error as a share of its tolerance, a row a case."""
    cases = list(dict.fromkeys(output.case for output in outputs))
    left, span = 190.0, 420.0
    sheet = Sheet(left + span + 40, 74 + 20 * len(cases), f"{system}: errors of recorded outputs")
    sheet.word(16, 20, f"{system}: largest error of each output, in tolerances", bold=True)
    bottom = 40 + 20 * len(cases)
    for exponent in range(-6, 1):
        x = left + 60 + (span - 60) * (exponent + 6) / 6
        sheet.line([(x, 34), (x, bottom)], "#d7dde3" if exponent else "#c0392b")
        label = "1" if exponent == 0 else f"1e{exponent}"
        sheet.word(x, bottom + 16, label, size=10, colour=SOFT, anchor="middle")
    sheet.word(left + 20, bottom + 16, "equal", size=10, colour=SOFT, anchor="middle")
    for row, case in enumerate(cases):
        y = 48 + 20 * row
        sheet.word(left - 8, y + 4, case, size=11, colour=SOFT, anchor="end")
        for output in outputs:
            if output.case == case:
                sheet.dot(_place(output, left, span), y)
    sheet.word(left + 60, bottom + 31, "red: the tolerance", size=10, colour=SOFT)
    return sheet.text()


def _place(output: Compared, left: float, span: float) -> float:
    if output.error == 0:
        return left + 20
    share = max(log10(output.error / output.tolerance), -6) if output.tolerance else 0
    return left + 60 + (span - 60) * (share + 6) / 6

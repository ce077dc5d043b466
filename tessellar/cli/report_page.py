"""The page of `tessellar report`: HTML with everything in it, curves as SVG, pictures as data.

Nothing is fetched when it is opened, and whatever comes from files is escaped.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain
from math import floor, isfinite, log10
from pathlib import Path
from typing import NamedTuple

COLOURS = ("#1f5fa8", "#c8501e", "#2e8540", "#8250a0", "#9a7b00", "#0a8a8a", "#b03060", "#555555")
WIDTH = 340
HEIGHT = 200
LEFT = 52
BOTTOM = 22
TOP = 8
RIGHT = 10
STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; border-bottom: 1px solid #ddd; margin-top: 2em }
h3 { font-size: 1em; margin: 1em 0 .3em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
th { font-weight: 600 } tr + tr > * { border-top: 1px solid #eee }
pre { background: #f6f6f4; padding: .8em; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }
.panels { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0 } figcaption { font-size: .85em; color: #555 }
.strip { display: flex; flex-wrap: wrap; gap: 1em; padding-bottom: .5em }
.strip img { max-height: 640px; max-width: 100%; border: 1px solid #ddd }
.key { display: inline-block; width: 1em; height: .7em; margin-right: .4em }
svg text { font: 10px system-ui, sans-serif; fill: #555 } svg .name { font-size: 12px; fill: #222 }
"""

Points = Sequence[tuple[int, float]]


class Picture(NamedTuple):
    """A PNG with what is said below it."""

    path: Path
    caption: str


class Strip(NamedTuple):
    """Pictures side by side, over time, under a title."""

    title: str
    pictures: Sequence[Picture]


class Section(NamedTuple):
    """A heading with HTML below it; without any, the section is left out."""

    title: str
    body: str


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    body = ""
    for section in sections:
        if section.body:
            body += f"<h2>{escape(section.title)}</h2>\n{section.body}\n"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A row each entry: its name, then a cell for each column."""
    if not rows:
        return ""
    lines = ""
    if len(columns) > 1:
        lines = f"<tr>{_cells('th', ['', *columns])}</tr>"
    for name, cells in rows.items():
        lines += f"<tr>{_cells('th', [name])}{_cells('td', cells)}</tr>"
    return f"<table>{lines}</table>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def text(content: str, title: str = "") -> str:
    """Text as it is; folded away under a title where there is one."""
    block = f"<pre>{escape(content)}</pre>"
    return f"<details><summary>{escape(title)}</summary>{block}</details>" if title else block


def legend(names: Sequence[str]) -> str:
    """Which colour is which run."""
    keys = ""
    for place, name in enumerate(names):
        box = f'<span class="key" style="background:{_colour(place)}"></span>'
        keys += f"{box}{escape(name)}&emsp;"
    return f"<p>{keys}</p>"


def strips(rows: Sequence[Strip]) -> str:
    """Rows of pictures, each in the file itself; a row without any is left out."""
    lines = []
    for row in rows:
        figures = ""
        for picture in row.pictures:
            data = base64.b64encode(picture.path.read_bytes()).decode()
            caption = escape(picture.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            figures += f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        if figures:
            lines.append(f'<h3>{escape(row.title)}</h3><div class="strip">{figures}</div>')
    return "\n".join(lines)


def panels(curves: Mapping[str, Sequence[Points]]) -> str:
    """A panel each metric, with a line for each run (which may be empty)."""
    drawn = "".join(panel(name, lines) for name, lines in curves.items())
    return f'<div class="panels">{drawn}</div>' if curves else ""


def panel(name: str, lines: Sequence[Points]) -> str:
    """One metric over updates, as SVG; empty where no value is finite."""
    finite = []
    for line in lines:
        finite.append([point for point in line if isfinite(point[1])])
    points = list(chain.from_iterable(finite))
    if not points:
        return ""
    updates, values = zip(*points, strict=True)
    x_ticks = ticks(min(updates), max(updates))
    y_ticks = ticks(min(values), max(values))
    left = LEFT
    right = WIDTH - RIGHT
    low = HEIGHT - BOTTOM
    high = TOP + 16

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (right - left), low - up * (low - high)

    parts = [f'<text class="name" x="{LEFT}" y="{TOP + 6}">{escape(name)}</text>']
    for y in y_ticks:
        _, height = place(x_ticks[0], y)
        parts.append(_line([(LEFT, height), (WIDTH - RIGHT, height)], "#e6e6e6", 1))
        parts.append(f'<text x="{LEFT - 5}" y="{height + 3:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        across, _ = place(x, y_ticks[0])
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{x:g}</text>')
    for number, line in enumerate(finite):
        colour = _colour(number)
        placed = [place(x, y) for x, y in line]
        if len(placed) > 1:
            parts.append(_line(placed, colour, 1.6))
        if len(placed) < 30:
            for x, y in placed:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>')
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(parts)}</svg>'


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, evenly apart."""
    if low == high:
        half = abs(low) / 2 or 0.5
        low -= half
        high += half
    raw = (high - low) / about
    power = 10.0 ** floor(log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = floor(low / step)
    count = 1
    while (first + count) * step < high:
        count += 1
    return [round((first + k) * step, 12) for k in range(count + 1)]

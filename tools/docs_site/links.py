"""Links of a page as it is read on a forge, changed to those of the site; nothing here needs mkdocs.

A page of docs/ links to other pages, to pictures, and to files of the checkout. Of the latter some are pages of the
site (README, CONTRIBUTING, CHANGELOG); the others keep their text and lose their link, as no address of the sources is
known. A link whose text is the name of a page's file has the page's title for it. A link to a file that is not there
stays as it is, and the strict build names it.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Files of the root that are pages of the site.
OF_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
OF_ROOT |= {"CHANGELOG.md": "changelog.md"}

FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2`*~* *$", re.M | re.S)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.S)
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")
HEADING = re.compile(r"^(#+) +(.*?) *#* *$", re.M)


def prose(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a page in order, each with whether it is prose and not a block of code."""
    end = 0
    for fence in FENCE.finditer(text):
        yield text[end : fence.start()], True
        yield fence[0], False
        end = fence.end()
    yield text[end:], True


def for_site(text: str, source: str, root: Path = ROOT) -> str:
    """A page with the links of the site; `source` is its file, relative to the checkout."""
    page = _place(source)

    def changed(link: re.Match[str]) -> str:
        target, anchor = _parts(link["target"])
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        aim = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (root / aim).exists():
            return link[0]
        place = _place(aim)
        if place is None:
            return link["text"]
        text = link["text"]
        if text in (target, posixpath.basename(target)) and target.endswith(".md"):
            text = title(root / aim)
        there = posixpath.relpath(place, posixpath.dirname(page or "") or ".")
        return f"{link['mark']}[{text}]({there}{anchor})"

    pieces = [LINK.sub(changed, piece) if plain else piece for piece, plain in prose(text)]
    return "".join(pieces)


def title(file: Path) -> str:
    """The first heading of a page, or the name of its file where it has none."""
    heading = HEADING.search(file.read_text(encoding="utf-8"))
    return file.name if heading is None else heading[2]


def _parts(target: str) -> tuple[str, str]:
    """A link's file and its anchor with the mark before it."""
    file, mark, anchor = target.partition("#")
    return file, f"{mark}{anchor}"


def _place(file: str) -> str | None:
    """Where a file of the checkout stands on the site; None where it does not."""
    if file in OF_ROOT:
        return OF_ROOT[file]
    inside = file.startswith("docs/") and file.endswith((".md", ".png", ".svg"))
    return file.removeprefix("docs/") if inside else None


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as forges and the site make them."""
    found: set[str] = set()
    for piece, plain in prose(text):
        for heading in HEADING.findall(piece) if plain else ():
            slug = slug_of(heading[1])
            number = 0
            while (name := f"{slug}-{number}" if number else slug) in found:
                number += 1
            found.add(name)
    return found


def slug_of(heading: str) -> str:
    """The anchor of a heading: small letters, hyphens for spaces, without other marks."""
    bare = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", bare.lower()).strip().replace(" ", "-")


def broken(file: Path, root: Path = ROOT) -> list[str]:
    """Relative links of a page whose file is not there, or whose anchor no heading has."""
    wrong = []
    for piece, plain in prose(file.read_text(encoding="utf-8")):
        for link in LINK.finditer(CODE.sub("", piece)) if plain else ():
            target, anchor = _parts(link["target"])
            if "://" in target or target.startswith("mailto:"):
                continue
            aim = (file.parent / target).resolve() if target else file
            there = aim.is_relative_to(root) and aim.exists()
            if there and anchor:
                there = anchor[1:] in anchors(aim.read_text(encoding="utf-8"))
            if not there:
                wrong.append(f"{file.relative_to(root)}: {link['target']}")
    return wrong

"""Lists as forges read them: two spaces go one level deeper, and a list may follow a line of text at once.

Python-Markdown wants four spaces and an empty line; this is set for the site, so a page reads alike in both places.
"""

import re
from typing import Any

from markdown import Markdown
from markdown.blockprocessors import ListIndentProcessor, OListProcessor, UListProcessor
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

ITEM = re.compile(r" *(?:[-*+]|\d+\.) +\S")


class BeforeLists(Preprocessor):
    """An empty line between a line of text and the list that follows it."""

    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        for number, line in enumerate(lines):
            before = lines[number - 1] if number else ""
            if ITEM.match(line) and before.strip() and not _in_list(lines, number):
                result.append("")
            result.append(line)
        return result


def _in_list(lines: list[str], number: int) -> bool:
    """Whether the paragraph before line `number` belongs to an item of a list."""
    for line in reversed(lines[:number]):
        if not line.strip():
            return False
        if ITEM.match(line):
            return True
    return False


class ForgeLists(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 (the library's name)
        md.tab_length = 2
        # These read the length when they are made, so they are made again; blocks of code keep theirs.
        md.parser.blockprocessors.register(ListIndentProcessor(md.parser), "indent", 90)
        md.parser.blockprocessors.register(OListProcessor(md.parser), "olist", 40)
        md.parser.blockprocessors.register(UListProcessor(md.parser), "ulist", 30)
        # After blocks of code were put aside, so that none of their lines is taken for a list.
        md.preprocessors.register(BeforeLists(md), "before_lists", 22)


def makeExtension(**options: Any) -> ForgeLists:  # noqa: N802 (the library's name)
    return ForgeLists(**options)

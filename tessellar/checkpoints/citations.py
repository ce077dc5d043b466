"""Which papers a model is made of, and their BibTeX.

Facts are those of the sources: the header of a class's package or file, and the class's own
docstring, name its papers by their arXiv ids. Nothing is imported for it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).parents[1]
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
SPECIAL = {
    "{": "(",
    "}": ")",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\^{}",
    "$": r"\$",
}


def class_paths(description: Any) -> Iterator[str]:
    """Every `class_path` in the plain data of a config, in its order."""
    if isinstance(description, dict):
        path = description.get("class_path")
        if isinstance(path, str):
            yield path
        for value in description.values():
            yield from class_paths(value)
    elif isinstance(description, list):
        for value in description:
            yield from class_paths(value)


def papers_of(description: Any) -> dict[str, str]:
    """arXiv ids of the methods that a config names, each with the paragraph that names it."""
    found: dict[str, str] = {}
    for path in class_paths(description):
        for text in _docstrings(path):
            for paragraph in text.split("\n\n"):
                for paper in ARXIV.findall(paragraph):
                    found.setdefault(paper, " ".join(paragraph.split()))
    return found


def _docstrings(class_path: str) -> Iterator[str]:
    """Of the package or file that a class path of ours names, then of the class in that file."""
    words = class_path.split(".")
    if words[0] != PACKAGE.name:
        return
    folder = PACKAGE.joinpath(*words[1:-1])
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    if not file.is_file():
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    yield ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == words[-1]:
            yield ast.get_docstring(node) or ""


def bibtex(papers: dict[str, str]) -> str:
    """One `@misc` a paper, its year from its arXiv id; authors are not known here.

    A paper whose title is not known has our header's words as a note.
    """
    file = Path(__file__).with_name("titles.yaml")
    titles = yaml.safe_load(file.read_text(encoding="utf-8"))
    return "\n\n".join(_entry(paper, titles.get(paper), said) for paper, said in papers.items())


def _entry(paper: str, title: str | None, said: str) -> str:
    fields = {
        "title": f"{{{_escaped(title or f'arXiv {paper}')}}}",
        "eprint": paper,
        "archivePrefix": "arXiv",
        "year": f"20{paper[:2]}",
        "url": f"https://arxiv.org/abs/{paper}",
    }
    if title is None:
        fields["note"] = _escaped(said)
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{arxiv{paper.replace('.', '_')},", *lines, "}"])


def _escaped(text: str) -> str:
    for character, escaped in SPECIAL.items():
        text = text.replace(character, escaped)
    return text

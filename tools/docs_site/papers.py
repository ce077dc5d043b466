"""The papers of this tree: packages under tokenizers/ and models/ by their first arXiv id, and what they say.

Everything comes from what is there already: headers and docstrings of the packages, configs, recorded recipes,
recordings, the tables of docs/. Nothing heavy is imported.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tessellar.cli.catalogue import Entry, configs, entries, parsed

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("tokenizers", "generators")
#: Titles of papers whose packages carry other names.
TITLES = {
    "2502.13967": "FlexTok",
    "2601.03955": "ResTok",
    "2202.04200": "MaskGIT",
    "2502.20388": "xAR",
    "2602.14041": "BitDance",
    "2112.10752": "KL autoencoders (LDM)",
    "2510.06590": "Ming-UniVision",
    "2501.07730": "TA-TiTok",
    "2505.12728": "FLASH",
    "2507.01957": "LPD",
    "2503.16430": "TokenBridge",
}
#: How sentences begin that say what differs from the paper or its code, or is not there.
DIFFERS = re.compile(
    r"(Different from|Inferred|Not there|Out of scope|Choices of ours|There is no official|It publishes no"
    r"|Training code|Its training code|The block is a plausible|Named here|The authors released|The released"
    r"|Guidance has two|Ours:|The official cached)"
)


@dataclass(frozen=True)
class Package:
    """One folder of a paper: `entry` is that of the catalogue."""

    entry: Entry

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def folder(self) -> Path:
        """The folder in the checkout, relative to it."""
        return Path("tokenizers" if self.entry.kind == "tokenizers" else "models") / self.name

    @property
    def module(self) -> str:
        return f"tessellar.{'.'.join(self.folder.parts)}"

    @property
    def kind(self) -> str:
        return self.entry.kind.removesuffix("s")

    @cached_property
    def story(self) -> "Story":
        """What the system's own file says."""
        file = "tokenizer.py" if self.kind == "tokenizer" else "model.py"
        docstring = ast.get_docstring(parsed(ROOT / self.folder / file))
        assert docstring, f"{self.folder / file} has no docstring"
        return story_of(docstring)

    @cached_property
    def recordings(self) -> tuple[str, ...]:
        """Names of the recordings of official outputs that it replays."""
        file = ROOT / self.folder / "parity.py"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = re.findall(r'^@replays\(\s*"(\w+)"', text, re.M)
        return tuple(dict.fromkeys(found))

    @property
    def imports(self) -> bool:
        """Whether official weights can be read."""
        return (ROOT / self.folder / "official.py").is_file()

    @cached_property
    def configs(self) -> tuple[Entry, ...]:
        """Configs that build its models."""
        mentioned = re.compile(rf"\b{re.escape(self.module)}\.\w")
        return tuple(entry for entry, code in _configs() if mentioned.search(code))


@dataclass(frozen=True)
class Paper:
    """The packages that name one paper first."""

    arxiv: str
    packages: tuple[Package, ...]

    @property
    def slug(self) -> str:
        """The page's name: that of the folder called as the paper, or the shortest one."""
        names = [package.name for package in self.packages]
        called = re.sub(r"\W", "_", self.title.lower())
        return called if called in names else min(names, key=len)

    @property
    def title(self) -> str:
        if self.arxiv in TITLES:
            return TITLES[self.arxiv]
        names = [re.split(r"[:,(]|'s |\u2019s | over ", p.entry.what)[0] for p in self.packages]
        return min(names, key=len)

    @property
    def others(self) -> tuple[str, ...]:
        """Further papers that its packages name."""
        named = [number for package in self.packages for number in package.entry.papers]
        return tuple(number for number in dict.fromkeys(named) if number != self.arxiv)

    def of(self, what: str) -> list[str]:
        """`what` (recordings) of all packages, each once."""
        return list(dict.fromkeys(name for p in self.packages for name in getattr(p, what)))

    @property
    def configs(self) -> list[Entry]:
        found = {entry.name: entry for package in self.packages for entry in package.configs}
        return list(found.values())


@dataclass(frozen=True)
class Story:
    """A docstring in parts: what it is, its paragraphs and drawings, and what differs or is not there."""

    first: str
    parts: tuple[str, ...]
    differences: tuple[str, ...]


@cache
def papers() -> list[Paper]:
    """All papers, by title."""
    found: dict[str, list[Package]] = {}
    for kind in KINDS:
        for entry in entries(kind):
            assert entry.papers, f"the header of {entry.name} names no paper"
            found.setdefault(entry.papers[0], []).append(Package(entry))
    made = [Paper(arxiv, tuple(packages)) for arxiv, packages in found.items()]
    return sorted(made, key=lambda paper: paper.title.lower())


def story_of(docstring: str) -> Story:
    """A module's docstring taken apart; paragraphs that are drawings stay as they are, in fences."""
    first, *rest = docstring.split("\n\n")
    parts: list[str] = []
    differences: list[str] = []
    for paragraph in rest:
        if paragraph.startswith("Shapes:"):
            continue
        if re.search(r"^ {2,}\S", paragraph, re.M):
            parts.append(f"```text\n{_dedented(paragraph)}\n```")
            continue
        told: list[str] = []
        for sentence in sentences(paragraph):
            (differences if DIFFERS.match(sentence) else told).append(sentence)
        if told:
            parts.append(re.sub(r"^arXiv \d{4}\.\d{5}\. ", "", " ".join(told)))
    return Story(" ".join(first.split()), tuple(parts), tuple(differences))


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, each in one line."""
    text = " ".join(paragraph.split())
    return re.split(r"(?<=[a-z0-9)`\]\"'][.]) (?=[A-Z\"`])", text)


def _dedented(block: str) -> str:
    lines = block.splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[margin:] for line in lines)


@cache
def _configs() -> list[tuple[Entry, str]]:
    """All configs, each with its YAML without comments."""
    found = ((entry, entry.file.read_text(encoding="utf-8")) for entry in configs())
    return [(entry, re.sub(r"(^|\s)#.*", "", text)) for entry, text in found]


@dataclass(frozen=True)
class Row:
    """A row of a table of docs/ that measured something of a paper: its page, heading and table's head."""

    page: str
    heading: str
    head: str
    row: str


@cache
def measured() -> tuple[Row, ...]:
    """All rows of the tables on the pages that hold what was measured here."""
    found = []
    for name in ("tokenizers", "generators", "small_recipes"):
        heading = head = ""
        for line in (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
            if not line.startswith("|"):
                head = ""
            elif not head:
                head = line
            elif not line.startswith("|---"):
                found.append(Row(name, heading, head, line))
    return tuple(found)


def rows_of(names: Iterable[str]) -> list[Row]:
    """Rows whose first cell begins with one of `names`, as a word."""
    wanted = re.compile(rf"^\| *`?({'|'.join(map(re.escape, names))})(?![\w-])", re.I)
    return [row for row in measured() if wanted.match(row.row)]

"""The tables of systems in README.md, made from the headers of the papers' packages. `--write` puts them there.

Without it, says whether the page is stale (exit code 1); a test does the same.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
ARXIV = re.compile(r"\d{4}\.\d{5}")
KINDS = ("tokenizers", "models")


def header(package: Path) -> str:
    """First sentence of a package's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert docstring, f"{package} has no header"
    return " ".join(docstring.split("\n\n")[0].split())


def table(kind: str) -> str:
    """One row a paper of `kind`: what it is, its folder, its papers."""
    rows = ["| what | folder | arXiv |", "|---|---|---|"]
    for package in sorted((ROOT / kind).iterdir()):
        if not (package / "__init__.py").is_file() or package.name in ("parts", "losses"):
            continue
        text = header(package)
        papers = list(dict.fromkeys(ARXIV.findall(text)))
        said = re.sub(r"\s*\((?:[^()]*arXiv[^()]*)\)", "", text).rstrip(".")
        rows.append(
            f"| {said} | `{kind}/{package.name}/` | {', '.join(papers) or 'in each file'} |"
        )
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """The page with its tables made anew, each between its two markers."""
    for kind in KINDS:
        start = f"<!-- {kind}: made by tools/systems.py -->"
        end = f"<!-- end of {kind} -->"
        before, rest = page.split(start)
        after = rest.split(end)[1]
        page = f"{before}{start}\n{table(kind)}\n{end}{after}"
    return page


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    made = with_tables(page)
    if "--write" in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if made != page:
        print("README.md is stale: run python tools/systems.py --write")
    return int(made != page)


if __name__ == "__main__":
    sys.exit(main())

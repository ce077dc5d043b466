"""mkdocs' hooks: pages that are made, links and lists as forges read them, which commands are not run here."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from docs_commands import lines_of, with_count, with_reasons  # noqa: E402
from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402

from docs_site import api, pages  # noqa: E402
from docs_site.links import OF_ROOT, for_site  # noqa: E402
from docs_site.lists import ForgeLists  # noqa: E402
from docs_site.papers import papers  # noqa: E402

SOURCES = ROOT / "outputs" / "site_sources"


def on_startup(**_: Any) -> None:
    """The package with real files in place of links, which the reader of docstrings does not follow."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    unread = shutil.ignore_patterns("__pycache__", "configs")
    shutil.copytree(ROOT / "tessellar", SOURCES / "tessellar", ignore=unread)
    for folder in filter(Path.is_dir, list(SOURCES.rglob("*"))):
        (folder / "__init__.py").touch()  # it finds no packages without


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages of docs/ that the navigation does not name stand at the end of "How to"."""
    config.markdown_extensions.append(ForgeLists())  # type: ignore[arg-type]
    sections = {name: pages for section in config.nav or [] for name, pages in section.items()}
    named = {page for pages in sections.values() for page in pages}
    sections["Papers"] += ["papers/index.md", *(f"papers/{paper.slug}.md" for paper in papers())]
    sections["API"] += ["api/index.md", *(f"api/{name}.md" for name in api.pages())]
    docs = Path(config.docs_dir)
    for file in sorted(docs.rglob("*.md")):
        place = file.relative_to(docs).as_posix()
        if place not in named:
            sections["How to"].append(place)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for source, place in OF_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=for_site(text, source)))
    for place, content in made().items():
        files.append(File.generated(config, place, content=content))
    return files


def made() -> dict[str, str]:
    """Places and contents of the pages of papers with their figures, and of the API."""
    found = {"papers/index.md": pages.index(), "api/index.md": api.index()}
    for paper in papers():
        found[f"papers/{paper.slug}.md"] = pages.page_of(paper)
        for name, figure in pages.figures_of(paper).items():
            found[f"papers/{name}"] = figure
    for name, page in api.pages().items():
        found[f"api/{name}.md"] = page
    return found


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The links of the site, of a page that lies in docs/; below each block of commands whether it is run; the
    count of all commands, where a page has a place for it.
    """
    if page.file.generated_by is None:
        markdown = for_site(markdown, f"docs/{page.file.src_uri}")
    return with_count(with_marks(markdown))


def with_marks(markdown: str) -> str:
    """Says below each block of commands that `make check` runs it at a tiny size, or why not."""

    def marked(block: re.Match[str]) -> str:
        found = with_reasons(lines_of(block[1]))
        reasons = list(dict.fromkeys(reason for _, reason in found if reason))
        left = sum(bool(reason) for _, reason in found)
        said = "Run at a tiny size by `make check`."
        if left:
            which = "Not run here" if left == len(found) else f"{left} of {len(found)} not run here"
            said = f"{which}: {'; '.join(reasons)}."
        return f"{block[0]}\n<small>{said}</small>\n"

    return re.sub(r"^```bash\n(.*?)^```$", marked, markdown, flags=re.M | re.S)

"""mkdocs' hooks: pages that are made, links and lists as forges read them, which commands are not run here."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402

from docs_site.links import OF_ROOT, for_site  # noqa: E402
from docs_site.lists import ForgeLists  # noqa: E402


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages of docs/ that the navigation does not name stand at the end of "How to"."""
    config.markdown_extensions.append(ForgeLists())  # type: ignore[arg-type]
    sections = {name: pages for section in config.nav or [] for name, pages in section.items()}
    named = {page for pages in sections.values() for page in pages}
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
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The links of the site, of a page that lies in docs/."""
    if page.file.generated_by is not None:
        return markdown
    return for_site(markdown, f"docs/{page.file.src_uri}")

"""The site: links of all pages, on a forge and on the site; pages that are made."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from docs_site.links import OF_ROOT, anchors, broken, for_site, slug_of  # noqa: E402

PAGES = [ROOT / name for name in OF_ROOT] + sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_named_and_one_in_code_is_not(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[here](#a-page), [there](other.md#part), [gone](gone.md), [no part](other.md#no)\n"
        "`[x](y)`\n\n```text\n[a](b)\n```\n[away](https://example.org/x)\n"
    )
    (tmp_path / "other.md").write_text("## Part\n")
    assert broken(page, tmp_path) == ["page.md: gone.md", "page.md: other.md#no"]


def test_links_of_a_forge_become_those_of_the_site(tmp_path: Path) -> None:
    for name in ("README.md", "train.py", "docs/cost.md", "docs/recipes/all.md", "docs/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    text = "[cost](docs/cost.md#x) ![a](docs/a.png) [code](train.py) [gone](gone.md)"
    made = "[cost](cost.md#x) ![a](a.png) code [gone](gone.md)"
    assert for_site(text, "README.md", tmp_path) == made
    text = "[start](../../README.md) [cost](../cost.md) [here](#x) [out](https://example.org)"
    made = "[start](../index.md) [cost](../cost.md) [here](#x) [out](https://example.org)"
    assert for_site(text, "docs/recipes/all.md", tmp_path) == made
    fenced = "```text\n[code](train.py)\n```\n"
    assert for_site(fenced, "README.md", tmp_path) == fenced


def test_anchors_are_those_of_a_forge() -> None:
    assert slug_of("xAR: which X, which context") == "xar-which-x-which-context"
    assert slug_of("`make soak`'s [runs](a.md) & more") == "make-soaks-runs--more"
    assert anchors("# One\n## Two\n```bash\n# no\n```\n## Two\n") == {"one", "two", "two-1"}

"""docs/recipes/imagenet256.md says what the recordings, the YAMLs and the list of differences say."""

import runpy

from tests.recipes.frame import ENTRIES, ROOT

FOLDER = ROOT / "docs" / "recipes"


def test_the_page_of_recipes_is_up_to_date() -> None:
    made = runpy.run_path(str(FOLDER / "make_page.py"))["page"]()
    stale = "stale: run python docs/recipes/make_page.py"
    assert (FOLDER / "imagenet256.md").read_text() == made, stale
    assert all(f"| `{name}` |" in made for name in ENTRIES)

"""The site: links of all pages, on a forge and on the site; pages and figures that are made."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import markdown
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import docs_commands  # noqa: E402
from docs_site import api, concepts, figures, pages, parity, systems  # noqa: E402
from docs_site.links import OF_ROOT, anchors, broken, for_site, slug_of  # noqa: E402
from docs_site.lists import ForgeLists  # noqa: E402
from docs_site.papers import Paper, papers, rows_of, story_of  # noqa: E402

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


def test_a_link_named_by_its_file_has_the_title_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cost.md").write_text("# What a config costs\n")
    text = "[docs/cost.md](docs/cost.md#x) and [cost](docs/cost.md)"
    made = "[What a config costs](cost.md#x) and [cost](cost.md)"
    assert for_site(text, "README.md", tmp_path) == made
    text = "[cost.md](../cost.md)"
    assert for_site(text, "docs/recipes/all.md", tmp_path) == "[What a config costs](../cost.md)"


def test_anchors_are_those_of_a_forge() -> None:
    assert slug_of("xAR: which X, which context") == "xar-which-x-which-context"
    assert slug_of("`make soak`'s [runs](a.md) & more") == "make-soaks-runs--more"
    assert anchors("# One\n## Two\n```bash\n# no\n```\n## Two\n") == {"one", "two", "two-1"}


def test_lists_follow_text_at_once_and_two_spaces_nest() -> None:
    made = markdown.markdown("said:\n- one\n  - inner\n- two\n  goes on", extensions=[ForgeLists()])
    assert made.count("<ul>") == 2 and "<p>said:</p>" in made
    assert "inner</li>" in made and "two\ngoes on" in made.replace("  ", "")


def paper(slug: str) -> Paper:
    return next(paper for paper in papers() if paper.slug == slug)


def test_every_folder_of_a_paper_has_a_page_of_its_own_paper() -> None:
    folders = {package.folder.as_posix() for paper in papers() for package in paper.packages}
    headers = {
        file.parent.relative_to(ROOT).as_posix()
        for kind, system in (("tokenizers", "tokenizer.py"), ("models", "model.py"))
        for file in (ROOT / kind).glob(f"*/{system}")
    }
    assert folders == headers
    slugs, titles = [p.slug for p in papers()], [p.title for p in papers()]
    assert len(set(slugs)) == len(set(titles)) == len(papers()) > 25
    assert {p.name for p in paper("restok").packages} == {"restok", "har"}


def test_a_docstring_is_taken_apart() -> None:
    story = story_of(
        "X: a thing.\n\nIt reads `a.b`. Different from the official code: no cache; a width. It ends.\n\n"
        "    input   x_0\n    output  x_1\n\nShapes: B images."
    )
    assert story.first == "X: a thing."
    assert story.parts == ("It reads `a.b`. It ends.", "```text\ninput   x_0\noutput  x_1\n```")
    assert story.differences == ("Different from the official code: no cache; a width.",)


def test_the_recorded_verification_is_of_the_recordings_that_are_there() -> None:
    assert parity.stale() == [], "run python tools/docs_site/parity.py"
    outputs = parity.compared("llamagen")
    assert len(outputs) > 40 and all(o.error <= o.tolerance for o in outputs if o.tolerance)
    report = {"folder": "x", "passed": False, "outputs": [], "out_of_scope": []}
    with pytest.raises(SystemExit, match="x: not everything passed"):
        parity.made([report], "abc")


def test_a_page_says_what_the_tree_says() -> None:
    page = pages.page_of(paper("llamagen"), drawn=False)
    for section in ("The idea", "What is here", "Configs", "Parity", "Measured here", "Published"):
        assert f"\n## {section}" in page
    assert "no queue of recent codes" in page.split("## What differs")[1].split("\n## ")[0]
    assert "| `imagenet256/llamagen_b` | 110,888,448 | 256 |" in page
    assert "python convert.py verify tests/golden/llamagen" in page
    assert "python convert.py import llamagen c2i-b-256 --out" in page
    without = pages.page_of(paper("arpg"), drawn=False)
    assert "published weights are not read" in without and "No outputs of official code" in without


def test_rows_of_what_was_measured_are_those_of_the_names() -> None:
    assert {row.row.split("|")[1].strip() for row in rows_of(["kl_f4"])} == {"kl_f4"}
    assert not rows_of(["kl"])


def test_figures_are_of_the_systems_themselves() -> None:
    var = systems.system_of("VAR")
    assert var.entity == (0,) + (1,) * 4 + (2,) * 16 and not var.drawn and var.head == "Logits"
    drawing = figures.system_figure(var)
    assert "3 for 21 tokens" in drawing and drawing.count(">3</text>") == 16
    assert systems.system_of("RandAR").drawn
    assert {var.head, systems.system_of("MAR").head} < set(figures.HEADS)
    shown = figures.tokenizer_figure(systems.tokens_of("ResTok"))
    assert "any prefix from 4 decodes" in " ".join(re.findall(r">([^<]*)</text>", shown))


def test_words_of_a_figure_fit_into_it() -> None:
    drawing = figures.tokenizer_figure(systems.tokens_of("VAR's VQVAE"))
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)[0])
    words = re.findall(r'x="16.0" y="([\d.]+)" font-size="12"[^>]*>([^<]*)<', drawing)
    assert len(words) >= 3  # its name, then two lines
    for below, line in words:
        assert float(below) < height - 4 and 16 + figures.LETTER * len(line) < width


def test_marks_of_parity_lie_left_of_their_tolerance() -> None:
    outputs = [parity.Compared("a", "c", 0.0, 0.1), parity.Compared("b", "c", 0.05, 0.1)]
    drawing = figures.parity_figure("x", outputs)
    assert drawing.count("<circle") == 2
    places = [figures._place(output, 0, 420) for output in outputs]
    assert places[0] == 20 < 60 < places[1] < 420


def test_the_figures_of_concepts_are_those_that_are_made() -> None:
    stale = [
        name
        for name, content in concepts.figures().items()
        if (ROOT / "docs" / "pictures" / name).read_text() != content
    ]
    assert stale == [], "run python tools/docs_site/concepts.py"


def test_commands_are_run_or_have_a_reason() -> None:
    lines = ["python convert.py import x FILE --out runs/x", "python sample.py runs/x --out o"]
    found = docs_commands.with_reasons([*lines, "python sample.py runs/y"])
    assert [bool(reason) for _, reason in found] == [True, True, False]
    text = docs_commands.papers_pages()
    verified = {line for line in docs_commands.lines_of(text) if "convert.py verify" in line}
    golden = {folder.name for folder in (ROOT / "tests" / "golden").iterdir()}
    named = {word.rpartition("/")[2] for line in verified for word in line.split()[3:]}
    assert named <= golden and len(named) > 20


def test_the_count_of_commands_stands_among_what_was_counted() -> None:
    text = docs_commands.with_count((ROOT / "docs" / "guarantees.md").read_text())
    total, run, left = map(int, re.findall(r"\d+", docs_commands.counted()))
    assert total == run + left and run > 100
    assert f"{total} commands on the pages: {run} run at tiny size, {left} marked" in text


def test_pages_of_the_api_name_modules_that_are_there() -> None:
    assert "tessellar.protocol.layout" in api.modules_in("tessellar.protocol")
    made = api.pages()
    assert "::: tessellar.models.xar.xar_b\n" in made["models_xar"]
    rooms = [name for _, names in api.PAGES.values() for name in names]
    assert all(len(api.modules_in(name)) >= 1 for name in rooms) and "protocol" in made


@pytest.mark.long
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "papers" / "llamagen" / "index.html").is_file()
    assert "Not run here" in (tmp_path / "papers" / "llamagen" / "index.html").read_text()

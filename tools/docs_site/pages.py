"""The pages of papers in markdown, and their list, made of what `papers.py`, `systems.py` and `parity.py` find."""

import re
from functools import cache

from docs_site.figures import parity_figure, system_figure, tokenizer_figure
from docs_site.links import slug_of
from docs_site.papers import ROOT, Package, Paper, Row, papers, rows_of
from docs_site.parity import compared, record
from docs_site.systems import System, Tokens, of_package
from tessellar.checkpoints.zoo import zoo
from tessellar.cli.catalogue import entries


def page_of(paper: Paper, drawn: bool = True) -> str:
    """The page of a paper, with or without its `figures_of`."""
    numbers = [
        f"[arXiv {number}](https://arxiv.org/abs/{number})"
        for number in (paper.arxiv, *paper.others)
    ]
    folders = ", ".join(f"`{package.folder}/`" for package in paper.packages)
    lines = [f"# {paper.title}", "", f"{', '.join(numbers)}. Here: {folders}.", ""]
    lines += ["## The idea", ""]
    for package in paper.packages:
        lines += [f"**{_sentence(package.story.first)}**", ""]
        for part in package.story.parts:
            lines += [part, ""]
    if drawn:
        lines += _drawn(paper)
    lines += _here_and_not(paper)
    lines += _configs(paper)
    lines += _parity(paper)
    lines += _measured(paper)
    lines += _published(paper)
    return "\n".join(lines).rstrip() + "\n"


def figures_of(paper: Paper) -> dict[str, str]:
    """Names and contents of a page's figures."""
    figures = {}
    for package in paper.packages:
        for number, found in enumerate(of_package(package.module)):
            figure = system_figure(found) if isinstance(found, System) else tokenizer_figure(found)
            figures[_name(paper, package, number)] = figure
    for system in paper.of("recordings"):
        figures[f"{paper.slug}-parity-{system}.svg"] = parity_figure(system, compared(system))
    return figures


def _name(paper: Paper, package: Package, number: int) -> str:
    return f"{paper.slug}-{package.kind}-{number}.svg"


def _sentence(text: str) -> str:
    """A sentence without its arXiv ids, which stand at the head of the page."""
    return re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", text)


def _drawn(paper: Paper) -> list[str]:
    lines = []
    for package in paper.packages:
        for number, found in enumerate(of_package(package.module)):
            what = found.name if isinstance(found, Tokens) else f"{found.name}, entity by entity"
            lines += [f"![{what}]({_name(paper, package, number)})", ""]
    if not lines:
        return []
    said = (
        "Drawn from tiny instances of the classes themselves (`tests/tiny/pairs.py`): their layouts, "
        "the order that they plan, what one evaluation predicts. [Algorithms](../decoding.md) "
        "may take several entities an evaluation."
    )
    return ["## In pictures", "", said, "", *lines]


def _here_and_not(paper: Paper) -> list[str]:
    """What is implemented, and what differs or is left out."""
    lines = [
        "## What is here",
        "",
        "| | " + " | ".join(f"`{p.folder}/`" for p in paper.packages) + " |",
    ]
    lines.append("|---" * (len(paper.packages) + 1) + "|")
    offers = [", ".join(f"`{name}`" for name in package.entry.offers) for package in paper.packages]
    weights = ["read (`convert.py import`)" if p.imports else "not read" for p in paper.packages]
    recorded = [_recorded(package) for package in paper.packages]
    training = [f"{len(p.configs)} configs" if p.configs else "no config" for p in paper.packages]
    for title, cells in (
        ("classes and presets", offers),
        ("training", training),
        ("official weights", weights),
        ("recorded official outputs", recorded),
    ):
        lines.append(f"| {title} | {' | '.join(cells)} |")
    links = [f"[{p.module}](../api/{_api(p)}.md)" for p in paper.packages]
    lines += ["", f"Classes and their arguments: {', '.join(links)}.", ""]
    different = [sentence for package in paper.packages for sentence in package.story.differences]
    lines += ["## What differs, and what is not here", ""]
    lines += [f"- {sentence}" for sentence in different] or ["- Nothing that the sources name."]
    for package in paper.packages:
        if not package.imports:
            lines.append(f"- `{package.folder}/` has no importer: published weights are not read.")
        if not package.recordings:
            lines.append(
                f"- No outputs of official code are recorded for `{package.folder}/`: published sizes and the "
                "paper's invariants are its tests."
            )
    return [*lines, ""]


def _recorded(package: Package) -> str:
    return ", ".join(f"`{name}`" for name in package.recordings) or "none"


def _api(package: Package) -> str:
    return f"{package.folder.parts[0]}_{package.name}"


@cache
def costs() -> dict[str, tuple[str, str]]:
    """Trained parameters and tokens an image of every config, from docs/cost.md."""
    text = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    table = text.split("<!-- made by benchmarks/costs.py -->")[1]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 4 and "/" in cells[0]:
            found.setdefault(cells[0], (cells[1], cells[3]))
    return found


def _configs(paper: Paper) -> list[str]:
    if not paper.configs:
        return []
    lines = [
        "## Configs",
        "",
        "| config | trained parameters | tokens an image | what |",
        "|---|---|---|---|",
    ]
    for entry in paper.configs:
        trained, tokens = costs().get(entry.name, ("", ""))
        lines.append(f"| `{entry.name}` | {trained} | {tokens} | {_cell(entry.what)} |")
    first = next((e for e in paper.configs if e.name.startswith("fashion")), paper.configs[0])
    command = f"python train.py --config configs/{first.name}.yaml --print_config"
    lines += [
        "",
        "The comment at the head of each YAML has its command and what is expected of it; "
        "[cost.md](../cost.md) has what each costs. All keys of one, with their defaults:",
        "",
        f"```bash\n{command}\n```",
        "",
    ]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _parity(paper: Paper) -> list[str]:
    recordings = paper.of("recordings")
    if not recordings:
        return []
    facts = record()
    lines = ["## Parity", ""]
    for system in recordings:
        outputs = compared(system)
        shares = [output.error / output.tolerance for output in outputs if output.tolerance]
        equal = sum(output.error == 0 for output in outputs)
        lines += [
            f"`{system}`: {len(outputs)} recorded outputs of the official code, all within their tolerance; "
            f"{equal} without any difference, the largest error {max(shares, default=0):.2g} of its tolerance "
            f"(commit {facts['commit']}, torch {facts['torch'].partition('+')[0]}, CPU, float32, random weights).",
            "",
            f"![errors of {system}]({paper.slug}-parity-{system}.svg)",
            "",
        ]
    folders = " ".join(f"tests/golden/{system}" for system in recordings)
    return [*lines, f"```bash\npython convert.py verify {folders}\n```", ""]


def _measured(paper: Paper) -> list[str]:
    """Rows of what was measured here, under the heads of their tables."""
    names = {entry.name.rpartition("/")[2] for entry in paper.configs if "fashion" in entry.name}
    names |= {paper.title, *(package.name for package in paper.packages)}
    rows = rows_of(sorted(names))
    lines = ["## Measured here", ""]
    if not rows:
        said = "Nothing: no run of it stands in the tables of "
        return [
            *lines,
            said + "[tokenizers](../tokenizers.md) and [generators](../generators.md).",
            "",
        ]
    shown: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        shown.setdefault((row.page, row.heading, row.head), []).append(row)
    for (page, heading, head), found in shown.items():
        lines += [
            f"From [{heading}](../{page}.md#{slug_of(heading)}), which says how:",
            "",
            _plain(head),
        ]
        lines.append("|---" * (head.count("|") - 1) + "|")
        lines += [*(_plain(row.row) for row in found), ""]
    return lines


def _plain(row: str) -> str:
    """A row of another page without its links, which lead elsewhere from here."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", row)


def _published(paper: Paper) -> list[str]:
    """The published checkpoints of the zoo, and how the first generator of them is sampled and measured."""
    lines = ["## Published weights", ""]
    modules = tuple(f"{package.module}." for package in paper.packages)
    found = [weights for weights in zoo().values() if weights.model.startswith(modules)]
    if not found:
        return [*lines, "None of its checkpoints is known to [the zoo](../zoo.md).", ""]
    first = next((weights for weights in found if weights.kind == "generator"), found[0])
    commands = [first.importing()]
    if first.kind == "generator":
        settings = f" --config configs/{first.sampling}.yaml" if first.sampling else ""
        commands.append(f"python sample.py {first.export}{settings} --out outputs/{paper.slug}")
    if first.evaluation():
        commands.append(first.evaluation())
    lines += [
        f'`tessellar.load("{first.name}")` gives the model to Python. Here as an export, sampled, and '
        "measured as its paper does:",
        "",
        "```bash\n" + "\n".join(commands) + "\n```",
        "",
        "Numbers are the papers', not measured here; files, sizes and licences stand in [the zoo](../zoo.md), and "
        "[checkpoints.md](../checkpoints.md#official-weights) says what is read of a file.",
        "",
        "| name | what | parameters | licence | published |",
        "|---|---|---|---|---|",
    ]
    for weights in found:
        count = "unknown" if weights.parameters is None else f"{weights.parameters:,}"
        numbers = ", ".join(f"{key} {value}" for key, value in weights.published.items())
        cells = (f"`{weights.name}`", weights.what, count, weights.license, numbers or "-")
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return [*lines, ""]


def index() -> str:
    """The list of papers."""
    lines = [
        "# Papers",
        "",
        "Each is one folder, or a tokenizer's and a generator's. The pages are made from the headers of the "
        "packages, the configs, the recorded recipes and the recorded verification when the site is built.",
        "",
        "| paper | arXiv | what | recorded outputs |",
        "|---|---|---|---|",
    ]
    for paper in papers():
        what = "; ".join(package.entry.short for package in paper.packages)
        outputs = sum(len(compared(system)) for system in paper.of("recordings"))
        link = f"[{paper.title}]({paper.slug}.md)"
        lines.append(f"| {link} | {paper.arxiv} | {what} | {outputs or '-'} |")
    lines += [
        "",
        "## Decoding algorithms",
        "",
        "Written once for all generators: [decoding.md](../decoding.md).",
        "",
    ]
    lines += ["| algorithm | what |", "|---|---|"]
    for algorithm in entries("algorithms"):
        lines.append(f"| `{algorithm.name}` | {_cell(algorithm.what)} |")
    lines += [
        "",
        "Ways of training after training (VA-pi, CCA, GRPO): [alignment.md](../alignment.md). Search: "
        "[search.md](../search.md).",
    ]
    return "\n".join(lines) + "\n"

"""docs/zoo.md, made from tessellar/checkpoints/zoo.yaml. `--write` writes it.

Without it, says whether the page is stale (exit code 1); a test does the same.
"""

import sys
from pathlib import Path

from tessellar.checkpoints.zoo import UNKNOWN, Published, not_read, zoo

PAGE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"
INTRODUCTION = """# Published weights by name (downloaded nowhere here)

Written by `python tools/zoo_page.py --write` from `tessellar/checkpoints/zoo.yaml`.

```python
import tessellar

generator = tessellar.load("llamagen/c2i-b-256")  # with its tokenizer, llamagen/vq-16
tokenizer = tessellar.load("titok/b64")
```

```bash
tessellar list weights llamagen
tessellar show llamagen/c2i-b-256
python convert.py import llamagen c2i-b-256 --out runs/llamagen-c2i-b-256/export
python convert.py import llamagen hub:FoundationVision/LlamaGen/vq_ds16_c2i.pt --out exports/vq-16
```

The last two make exports; the third of an entry below, the fourth of any file of the hub. Files are looked for
in the folder that `TESSELLAR_MIRROR` names (`OWNER/REPO/FILE` below it; those that are not on the hub:
`SYSTEM/FILE`), then in the hub's cache, then on the hub, by `huggingface_hub`. Where none has it, one line says
what to download, and to where. Files are safetensors, or opened with `weights_only=True`. `sample.py` and
`evaluate.py` take exports.

What stands here is what the papers, their READMEs and code say as far as our notes hold it, and `unknown` where
they do not. No file could be downloaded where this was written: importers were tested on recorded small models
with the official keys, the names and the addresses below were not tried. A size is that of the file, parameters
are those of our model, which a test builds. Numbers are the papers', not measured here; `measure` is the
command that measures them so, where the paper's protocol is known.

A licence is that of the weights, where their authors state one: the model card of their repository, or a file of
the official code that speaks of weights ([below](#where-the-licences-of-weights-are-stated), read in stored copies).
A licence of the code alone leaves that of the weights `unknown`.
"""


def row(entry: Published) -> str:
    """One line of the table of its paper."""
    where = entry.repository if entry.repository != UNKNOWN else "unknown repository"
    count = UNKNOWN if entry.parameters is None else f"{entry.parameters:,}"
    size = f", {entry.size}" if entry.size != UNKNOWN else ""
    code = f" (code: {entry.code_license})" if entry.code_license != UNKNOWN else ""
    numbers = ", ".join(f"{name} {value:g}" for name, value in entry.published.items())
    config = f"`{entry.config}`" if entry.config else ""
    cells = [
        f"`{entry.name}`",
        entry.what + (f"; {entry.note}" if entry.note else ""),
        numbers,
        count,
        config,
        f"{where}: {entry.file}{size}",
        f"{entry.license}{code}",
    ]
    return f"| {' | '.join(cells)} |"


def sources() -> list[str]:
    """A table of the repositories whose weights have a known licence, and of the files that state it."""
    stated = {
        (entry.repository, entry.license, entry.license_source): None
        for entry in zoo().values()
        if entry.license_source
    }
    rows = [f"| {' | '.join(cells)} |" for cells in stated]
    return ["| weights of | licence | stated in |", "|---|---|---|", *rows]


def page() -> str:
    """The whole page: a table a system, where licences are stated, the commands that measure, what is not read."""
    lines = [INTRODUCTION]
    systems: dict[str, list[Published]] = {}
    for entry in zoo().values():
        systems.setdefault(entry.system, []).append(entry)
    for system, entries in systems.items():
        papers = dict.fromkeys(entry.arxiv for entry in entries)
        lines += ["", f"## {system} (arXiv {', '.join(papers)})", ""]
        lines += ["| name | what | published | parameters | config | file | licence |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [row(entry) for entry in entries]
    lines += ["", "## Where the licences of weights are stated", "", *sources()]
    lines += ["", "## Measuring the published numbers", "", "| name | measure |", "|---|---|"]
    for entry in zoo().values():
        if entry.evaluation():
            lines.append(f"| `{entry.name}` | `{entry.evaluation()}` |")
    lines += ["", "## Not read here", "", "| what | why |", "|---|---|"]
    lines += [f"| {what} | {why} |" for what, why in not_read().items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    stale = PAGE.read_text(encoding="utf-8") != page()
    if stale:
        print("docs/zoo.md is stale: python tools/zoo_page.py --write")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())

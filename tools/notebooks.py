"""docs/notebooks/*.ipynb, made from docs/notebooks/sources/*.py, without outputs.

    python tools/notebooks.py --write           write them
    python tools/notebooks.py --run [NAME ...]  execute them at a tiny size, each in an empty folder (extra `notebooks`)

Without an option it says which are stale (exit code 1); a test does the same. A source is Python with cells, `# %%`,
`# %% [markdown]` and `# %% parameters`: numbers that a tiny run sets otherwise.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
SOURCES = FOLDER / "sources"
CELL = re.compile(r"^# %%(?: (\[markdown\]|parameters))?\n", re.M)
#: What `--run` puts in place of a notebook's own parameters.
TINY: dict[str, dict[str, Any]] = {
    "train_on_shapes": {
        "TOKENIZER_UPDATES": 4,
        "GENERATOR_UPDATES": 4,
        "IMAGES": 64,
        "PER_CLASS": 2,
    },
    "published_weights": {"STEPS": 2},
    "new_tokenizer": {"UPDATES": 4, "IMAGES": 64},
    "speculative_decoding": {"DRAWS": 20_000, "IMAGES": 64},
    "paper_folder": {"UPDATES": 4, "IMAGES": 64},
}
SECONDS = 600  # that a cell may take


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a source in nbformat 4.5."""
    found = []
    _, *parts = CELL.split(text)
    for number, (kind, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if kind == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cell |= {"cell_type": "markdown", "source": "\n".join(lines)}
        else:
            cell |= {"cell_type": "code", "source": body.strip()}
            cell |= {"execution_count": None, "outputs": []}
        if kind == "parameters":
            cell["metadata"] = {"tags": ["parameters"]}
        found.append(cell)
    return found


def notebook(source: Path) -> dict[str, Any]:
    """A notebook as JSON holds it."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    made = cells(source.read_text(encoding="utf-8"))
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def text_of(source: Path) -> str:
    return json.dumps(notebook(source), indent=1, ensure_ascii=False) + "\n"


def tiny(made: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A notebook with other values of its parameters; raises KeyError for one that it does not have."""
    (cell,) = [each for each in made["cells"] if each["metadata"].get("tags") == ["parameters"]]
    for name, value in values.items():
        changed, count = re.subn(
            rf"^{name} = .*$", f"{name} = {value!r}", cell["source"], flags=re.M
        )
        if count != 1:
            raise KeyError(name)
        cell["source"] = changed
    return made


def run(source: Path) -> None:
    """Execute a notebook at its tiny size; raises nbclient's error with the cell and what it raised."""
    import nbformat
    from nbclient import NotebookClient

    text = json.dumps(tiny(notebook(source), TINY[source.stem]))
    made = nbformat.reads(text, as_version=4)
    nbformat.validate(made)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(made, timeout=SECONDS, kernel_name="python3", resources=resources).execute()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", nargs="*", metavar="NAME")
    options = parser.parse_args()
    stale = []
    for source in sorted(SOURCES.glob("*.py")):
        target = FOLDER / f"{source.stem}.ipynb"
        if options.write:
            target.write_text(text_of(source), encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != text_of(source):
            stale.append(target.name)
        if options.run is not None and (not options.run or source.stem in options.run):
            run(source)
            print(f"{source.stem}: executed")
    if stale:
        print(f"stale: {', '.join(stale)}; python tools/notebooks.py --write")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())

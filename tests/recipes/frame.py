"""What the tests of recipes share: the list of recipes, their recordings, and a model built from a YAML."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from tessellar.cli.recipes import (
    Entry,
    Facts,
    Recipe,
    compare,
    read_differences,
    read_entries,
    read_recipe,
    read_recorded,
    recorded_facts,
)
from tessellar.cli.train import parse
from tessellar.training.base import TrainingModule

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "imagenet256"
GOLDEN = ROOT / "tests" / "golden"
ENTRIES = {
    entry.config: entry for entry in read_entries(ROOT / "docs" / "recipes" / "recipes.yaml")
}
DIFFERENCES = read_differences(ROOT / "docs" / "recipes" / "differences.yaml")


def recipe_of(config: str) -> Recipe:
    return read_recipe(CONFIGS / f"{config}.yaml")


def recorded(system: str) -> dict[str, Any]:
    """The recorded recipe of a system; where none is recorded, the one that its spec states."""
    has_record = (GOLDEN / system / "recipe.json").is_file()
    return read_recorded(GOLDEN if has_record else ROOT / "docs" / "recipes" / "stated", system)


@cache
def recorded_part(system: str, part: str) -> Facts:
    return recorded_facts(recorded(system)["parts"][part])


def disagreements(entry: Entry, side: str, ours: Facts) -> list[str]:
    """What a recipe and its recording disagree on, as lines: facts that differ and are not listed as meant, and
    differences that are listed for this YAML and do not exist (any more)."""
    found = compare(recorded_part(entry.system, entry.parts[side]), ours)
    meant = [difference for difference in DIFFERENCES if difference.concerns(entry.config, side)]
    lines = [
        str(item)
        for item in found
        if not any(d.covers(entry.config, side, item.name) for d in meant)
    ]
    for difference in meant:
        if not any(difference.covers(entry.config, side, item.name) for item in found):
            lines.append(f"differences.yaml lists {difference.fact}, which does not differ")
    return lines


def build(config: str, tokenizer: str | None, folder: Path) -> TrainingModule:
    """The module of a YAML on the meta device; `tokenizer` (a class path) stands in for the export that it names.

    The perceptual loss, whose weights a test does not have, is left out.
    """
    given: dict[str, Any] = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    arguments = given["model"]["init_args"]
    if tokenizer is not None:
        arguments["tokenizer"] = {"class_path": tokenizer}
    if "loss" in arguments:
        arguments["loss"]["init_args"].pop("perceptual", None)
    copy = folder / f"{config}.yaml"
    copy.write_text(yaml.safe_dump(given))
    options = [
        "--config",
        str(copy),
        "--name",
        "x",
        "--trainer.strategy",
        "auto",
        "--trainer.accelerator",
        "cpu",
    ]
    with torch.device("meta"):
        return parse([*options, "--trainer.devices", "1"]).model  # type: ignore[return-value]

"""Systems without a recording have a recipe from their spec, each value with the spec's line, or one that is ours.

docs/recipes/stated/SYSTEM/recipe.json: as the recordings', with `lines`, which gives for each value the spec's line,
its words there and its mark.
"""

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tessellar.cli.recipes import (
    Facts,
    compare,
    optimizer_facts,
    read_recipe,
    read_recorded,
    recorded_facts,
    schedule_facts,
)
from tessellar.models.flextok import FlexAR
from tessellar.models.next_entity import NextEntity
from tessellar.models.token_shuffle import TokenShuffle, token_shuffle_2b7
from tessellar.models.tokenflow import tokenflow_7b
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout, sequence_layout
from tessellar.tokenizers.tokenflow.quantizer import SIDES
from tests.recipes.frame import ENTRIES, ROOT
from tests.recipes.generator_facts import llama_facts

STATED = ROOT / "docs" / "recipes" / "stated"
SPECS = ROOT.parent / "shared" / "specs"
SYSTEMS = sorted(path.parent.name for path in STATED.glob("*/recipe.json"))
# Differences from the stated values that are meant.
MEANT = {
    "token_shuffle": {
        "global_batch": "from memory there; the config's is one image a process, as the memory allows",
        "optimizer.lr_for_batch": "as global_batch",
    }
}


def stated(system: str) -> dict[str, Any]:
    return read_recorded(STATED, system)


def values(recipe: dict[str, Any]) -> Facts:
    """Every value that is stated, of training and of sampling, by its name."""
    facts = {}
    for part, recorded in recipe["parts"].items():
        prefix = "" if part == "generator" else f"{part}."
        for name, value in recorded_facts(recorded).items():
            named = name in ("variant", "decay", "init") or fnmatchcase(name, "losses.*.name")
            if not named:
                facts[prefix + name] = value
    for number, variant in enumerate(recipe["sampling"]):
        for name, value in variant.items():
            if value is not None and name != "variant":
                facts[f"sampling.{number}.{name}"] = value
    return facts


def test_the_systems_are_those_without_a_recording() -> None:
    assert SYSTEMS == [
        "arpg",
        "bar",
        "flextok_ar",
        "mingtok",
        "next_entity",
        "randar",
        "rectok",
        "seed",
        "semanticist",
        "token_shuffle",
        "tokenflow",
        "vat",
    ]


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_value_has_its_line(system: str) -> None:
    recipe = stated(system)
    lines = recipe["lines"]
    for name in values(recipe):
        assert any(fnmatchcase(name, pattern) for pattern in lines), f"{name} has no line"
    spec = SPECS / str(recipe["source"]["spec"])
    if recipe["source"]["spec"] is None or not SPECS.is_dir():
        assert lines == {"*": "ours"} or recipe["source"]["spec"]
        return
    text = spec.read_text().splitlines()
    for name, (line, words, mark) in lines.items():
        assert words in text[line - 1], f"{name}: {spec.name}:{line} does not say {words!r}"
        assert mark in "PSMDC"


def training_facts(config: str, processes: int) -> Facts:
    """What a YAML says of optimizer, schedule and batch."""
    recipe = read_recipe(ROOT / "configs" / f"{config}.yaml")
    batch = recipe.data["batch_size"] * processes * recipe.model.get("accumulate", 1)
    return {
        **optimizer_facts(recipe.optimizer(), batch),
        **schedule_facts(recipe.schedule(), recipe.optimizer(), recipe.updates),
        "grad_clip": recipe.model.get("clip", 1.0) or "none",
        "global_batch": batch,
        "ema": "none" if recipe.ema is None else recipe.ema,
    }


def model_facts(generator: nn.Module) -> Facts:
    """What a built generator says of its dropouts and losses."""
    facts: Facts = {
        "dropout.label": generator.condition_dropout,
        "positions": generator.entities.count,  # type: ignore[union-attr]
        "losses.cross_entropy.weight": 1.0,
    }
    if isinstance(generator, TokenShuffle):
        facts["losses.text.weight"] = generator.text_loss_weight
        facts["losses.z.weight"] = generator.z_loss
    elif isinstance(generator, NextEntity):
        facts |= llama_facts(generator)
    return facts


def ours(system: str) -> Facts:
    with torch.device("meta"):
        match system:
            case "token_shuffle":
                model: nn.Module = token_shuffle_2b7(grid_layout(128, 128, Categorical(16384)))
                return {**training_facts("t2i/token_shuffle_2048", 8), **model_facts(model)}
            case "next_entity":
                made = read_recipe(ROOT / "configs" / "fashion_mnist" / "next_entity.yaml")
                options = made.model["generator"]["init_args"]
                model = NextEntity(grid_layout(8, 8, Categorical(512)), **options)
                return {**training_facts("fashion_mnist/next_entity", 1), **model_facts(model)}
            case "tokenflow":
                scales = tuple(Segment((p, p), Categorical(32_768)) for p in SIDES[16])
                model = tokenflow_7b(Layout(scales))
                return {**training_facts("t2i/tokenflow_7b", 8), **model_facts(model)}
            case _:
                model = FlexAR(sequence_layout(256, Categorical(64000)), 64, 1, 4, 1000)
                return model_facts(model)


# Those with a YAML of configs/imagenet256 are compared by test_tokenizers.py and test_generators.py.
LISTED = {entry.system for entry in ENTRIES.values()}
GENERATORS = [
    system for system in SYSTEMS if "generator" in stated(system)["parts"] and system not in LISTED
]


@pytest.mark.parametrize("system", GENERATORS)
def test_a_system_trains_as_its_recipe_states(system: str) -> None:
    found = compare(recorded_facts(stated(system)["parts"]["generator"]), ours(system))
    assert {item.name for item in found} == set(MEANT.get(system, {})), [
        str(item) for item in found
    ]


def test_flextoks_generators_are_sampled_as_stated() -> None:
    file = ROOT / "configs" / "imagenet256" / "sampling" / "flextok_ar.yaml"
    of_classes = next(v for v in stated("flextok_ar")["sampling"] if v["variant"] == "C2I")
    settings = yaml.safe_load(file.read_text())
    assert settings["guidance"]["init_args"]["scale"] == of_classes["guidance"]

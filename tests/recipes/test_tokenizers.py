"""Every tokenizer's YAML trains as its recorded recipe does, number by number; what is meant to differ is listed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tessellar.cli.recipes import facts_of
from tessellar.training.tokenizer_module import TokenizerModule
from tests.recipes.frame import CONFIGS, ENTRIES, build, disagreements, recipe_of
from tests.recipes.tokenizer_facts import discriminator_facts, tokenizer_facts

TOKENIZERS = [name for name, entry in ENTRIES.items() if "tokenizer" in entry.parts]


@pytest.mark.parametrize("config", TOKENIZERS)
def test_a_tokenizer_trains_as_its_recipe_says(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry, recipe = ENTRIES[config], recipe_of(config)
    module: Any = build(config, None, tmp_path)
    assert isinstance(module, TokenizerModule)
    ours = facts_of(recipe) | tokenizer_facts(recipe, module.tokenizer, entry.system)
    assert disagreements(entry, "tokenizer", ours) == []
    if "discriminator" in entry.parts:
        assert (
            disagreements(entry, "discriminator", discriminator_facts(recipe, entry.system)) == []
        )


def test_every_tokenizer_of_imagenet_is_listed() -> None:
    modules = {path.stem: path.read_text() for path in CONFIGS.glob("*.yaml")}
    assert {name for name, text in modules.items() if "TokenizerModule" in text} == set(TOKENIZERS)


@pytest.mark.parametrize("config", TOKENIZERS)
def test_losses_leave_autocast_where_the_official_ones_do(config: str) -> None:
    """TiTok's, One-D-Piece's and ResTok's do; LlamaGen's, Hita's and ReToK's do not; LDM and vaex train in float32."""
    loss = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["init_args"]["loss"][
        "init_args"
    ]
    assert loss.get("autocast", False) is (ENTRIES[config].system in ("llamagen", "hita", "retok"))


def test_images_of_resToks_discriminator_are_augmented_in_zero_to_one() -> None:
    found = {}
    for config in ("restok_l_128", "var_vqvae"):
        loss = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["init_args"][
            "loss"
        ]["init_args"]
        found[config] = loss["discriminator"]["init_args"]["augment"]["init_args"]
    order = ["colour", "translation", "cutout"]
    assert found["restok_l_128"] == {
        "probability": 0.5,
        "cutout": 0.2,
        "unit_range": True,
        "order": order,
    }
    assert found["var_vqvae"] == {"probability": 1.0, "cutout": 0.2}


def test_the_teacher_of_retok_sees_images_without_antialiasing() -> None:
    for config in ("retok_s_s", "retok_s_b"):
        tokenizer = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["init_args"][
            "tokenizer"
        ]
        teacher = tokenizer["init_args"]["teacher"]["init_args"]
        assert teacher["image_size"] == 224 and teacher["preprocessing"] == {"antialias": False}

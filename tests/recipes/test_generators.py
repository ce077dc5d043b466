"""Every generator's YAML trains as its recorded recipe does, number by number; what is meant to differ is listed."""

from pathlib import Path

import pytest

from tessellar.cli.recipes import facts_of
from tests.recipes.frame import CONFIGS, ENTRIES, build, disagreements, recipe_of
from tests.recipes.generator_facts import generator_facts

# Module of a generator: preset of a tokenizer whose tokens it reads; the others read LlamaGen's.
READS = {
    "xar": "kl_vae.kl16",
    "mar": "kl_vae.kl16",
    "tokenbridge": "tokenbridge.tokenbridge_kl16",
    "var": "var.var_vqvae",
    "har": "restok.restok_l_128",
    "hita": "hita.hita_v",
    "alitok": "alitok.alitok_256",
    "bitdance": "bitdance.ae_d16c32",
    "open_magvit2": "open_magvit2.open_magvit2_256",
    "ibq": "ibq.ibq_16384",
    "bar": "bar_fsq.bar_fsq_256",
    "semanticist": "semanticist.semanticist_l",
    "mingtok": "mingtok.mingtok_512",
}
GENERATORS = [name for name, entry in ENTRIES.items() if "generator" in entry.parts]


@pytest.mark.parametrize("config", GENERATORS)
def test_a_generator_trains_as_its_recipe_says(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry, recipe = ENTRIES[config], recipe_of(config)
    generator = recipe.model["generator"]
    path = generator if isinstance(generator, str) else generator["class_path"]
    paper = path.split(".")[-2]
    module = build(config, f"tessellar.tokenizers.{READS.get(paper, 'llamagen.vq_16')}", tmp_path)
    ours = facts_of(recipe) | generator_facts(module.ema_target, recipe)
    assert disagreements(entry, "generator", ours) == []


def test_every_generator_of_imagenet_is_listed() -> None:
    modules = {path.stem: path.read_text() for path in CONFIGS.glob("*.yaml")}
    assert {name for name, text in modules.items() if "GeneratorModule" in text} == set(GENERATORS)

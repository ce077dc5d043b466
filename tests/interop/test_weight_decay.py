"""Weight decay acts on the parameters that it acts on in the official code, system by system, name by name.

`recipe.json` of a recording says of every official parameter whether it decays, and tests/interop/official_names.py
where each parameter of ours is from. A part that trains without decay (Adam) is compared in that alone.
"""

from pathlib import Path

import pytest
import yaml
from torch import nn

from tessellar.models.next_entity import NextEntity
from tessellar.networks.vision import Teacher, VisionModel
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.tokenizers.losses.dino_discriminator import DinoDiscriminator
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.training.optim import OptimizerSettings
from tests.interop.official_names import GOLDEN, import_until, imported, recipe

CONFIGS = Path(__file__).parents[2] / "configs" / "imagenet256"
SYSTEMS = sorted(path.parent.name for path in GOLDEN.glob("*/recipe.json"))


def decaying(module: nn.Module, every: bool = False) -> dict[str, bool]:
    """Which parameters our optimizer decays (with `decayed: all` if `every`); those that a stage freezes are asked for
    all the same."""
    module.requires_grad_(True)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed = "all" if every else "tagged"
    optimizers = OptimizerSettings(weight_decay=0.1, decayed=decayed).make(module)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {names[id(p)]: group["weight_decay"] > 0 for group in groups for p in group["params"]}


PARTS = [(system, part) for system in SYSTEMS for part in recipe(system)]
LISTED = [(system, part) for system, part in PARTS if recipe(system)[part]["decay"] is not None]

# Parameters of ours that no recorded name stands behind, and why none does.
UNNAMED = {
    "Hita.vision.": "the frozen vision network, filled on its own before: no optimizer moves it",
}

# Parts that train in one group, whose YAMLs say `decayed: all`: a test below.
ONE_GROUP = {
    ("alitok", "discriminator"),
    *(("seed_voken", f"ibq_{size}") for size in ("b", "l", "xl", "xxl")),
    *(("seed_voken", f"magvit2_{size}") for size in ("b", "l", "xl")),
}

# Parts for which no names are recorded: what they are compared by instead.
OTHERWISE = {
    ("bitdance", "tokenizer"): "frozen; its training code is not published",
    ("uniwetok", "tokenizer"): "its training code is not published",
    ("flextok", "tokenizer"): "specs/flextok.md:56, see STATED",
    ("hita", "discriminator"): "Adam without weight decay: configs/imagenet256/hita_u.yaml",
    ("mar", "discriminator"): "Adam without weight decay: configs/imagenet256/kl16.yaml",
    ("one_d_piece", "stage2_discriminator"): "TiTok's class and rule: titok/stage2_discriminator",
    (
        "one_d_piece",
        "generator",
    ): "TiTok's MaskGIT with a ViT, whose tables hold `embedding`: generator_vit",
    (
        "seed_voken",
        "ibq_discriminator",
    ): "Adam without weight decay: configs/imagenet256/ibq_*.yaml",
    (
        "seed_voken",
        "magvit2_discriminator",
    ): "Adam without weight decay: configs/imagenet256/open_magvit2_*.yaml",
    ("restok", "discriminator"): "vectors do not decay, matrices do: see STATED",
    ("retok", "tokenizer_main_stage"): "as retok/tokenizer",
    ("retok", "discriminator"): "one group: `decayed: all` in configs/imagenet256/retok_s_*.yaml",
    ("titok", "ta_titok"): "TA-TiTok is not implemented here",
    ("var", "discriminator"): "vectors do not decay, matrices do: see STATED",
}


@pytest.mark.parametrize(("system", "part"), LISTED)
def test_weight_decay_acts_on_what_it_acts_on_officially(system: str, part: str) -> None:
    """Null names (buffers, frozen or absent parts) are not compared; without decay there is nothing to compare."""
    facts = recipe(system)[part]
    file = facts["decay"]["file"]
    official = {
        f"{file}/{name}": value
        for name, value in facts["decay"]["names"].items()
        if value is not None
    }
    has_decay = bool((facts.get("optimizer") or {}).get("weight_decay"))
    assert has_decay or not any(official.values())
    met, wrong = set(), []
    for item in imported(system):
        ours = decaying(item.module, (system, part) in ONE_GROUP)
        for name, sources in item.names.items():
            met |= sources
            said = {official[source] for source in sources & official.keys()}
            if has_decay and said and said != {ours[name]}:
                wrong.append(
                    f"{type(item.module).__name__}.{name} {ours[name]}, official {sorted(sources)} {said}"
                )
    assert sorted(set(wrong)) == []
    assert sorted(official.keys() - met) == [], "recorded names that no importer puts anywhere"


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "flextok"])
def test_every_parameter_has_an_official_name_or_a_reason(system: str) -> None:
    without = {
        f"{type(item.module).__name__}.{name}"
        for item in imported(system)
        for name, _ in item.module.named_parameters()
        if name not in item.names
    }
    assert sorted(name for name in without if not name.startswith(tuple(UNNAMED))) == []


def test_every_part_is_listed_or_compared_otherwise() -> None:
    assert set(PARTS) - set(LISTED) == set(OTHERWISE)


# Systems whose official groups are recorded nowhere, by the rule of ../shared/specs or of the recipe's note: matrices
# decay, vectors and scalars do not. Here: the only parameters of two or more dimensions that do not decay.
STATED: dict[str, set[str]] = {
    # xar.md:68: zero for biases and 1-D parameters only, position tables and embeddings are decayed
    "NextEntity": set(),
    # token_shuffle.md:65 names AdamW alone; its Llama is LlamaGen's, whose rule is dim >= 2
    "TokenShuffle": set(),
    # flextok.md:56: "wd on matrices only", which tables of registers are not; those of positions are fixed
    "FlexAR": set(),
    "FlexTok": {"encoder.registers", "decoder.register_positions"},
    # decay_note of the discriminators in the recipes of VAR, and of ResTok
    "PatchGAN": set(),
    "DinoDiscriminator": set(),
}


def made(name: str) -> nn.Module:
    match name:
        case "NextEntity":
            layout = grid_layout(4, 4, Categorical(50))
            return NextEntity(layout, "cell:2", width=32, depth=1, num_heads=4, num_classes=5)
        case "PatchGAN":
            return PatchGAN(8, 1)
        case "DinoDiscriminator":
            sizes = {"patch_size": 8, "embed_dim": 24, "depth": 3}
            vision = VisionModel("vit_tiny_patch16_224", image_size=32, options=sizes)
            return DinoDiscriminator(Teacher(vision), layers=(0, 2), kernel=3)
    systems = {"TokenShuffle": "token_shuffle", "FlexAR": "flextok_ar", "FlexTok": "flextok"}
    found = import_until(
        systems[name], lambda found: any(type(item.module).__name__ == name for item in found)
    )
    return found[-1].module


@pytest.mark.parametrize("name", STATED)
def test_weight_decay_follows_the_stated_rule(name: str) -> None:
    module = made(name)
    dimensions = {
        key: parameter.ndim
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    left_out = {key for key, decays in decaying(module).items() if key in dimensions and not decays}
    assert {key for key in left_out if dimensions[key] > 1} == STATED[name]
    assert {key for key, ndim in dimensions.items() if ndim < 2} <= left_out


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("retok_s_b", 0.0001),
        ("retok_s_s", 0.0001),
        ("alitok_stage1", 0.01),
        ("alitok_stage2", 0.01),
    ],
)
def test_some_discriminators_train_in_one_group(name: str, decay: float) -> None:
    """Recipe: AdamW(parameters) for both, so biases and norms of the discriminator decay too."""
    block = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    settings = block.get("discriminator_optimizer", block["optimizer"])
    optimizers = OptimizerSettings(**settings).make(PatchGAN(8, 1))
    decays = {group["weight_decay"] for optimizer in optimizers for group in optimizer.param_groups}
    assert decays == {decay}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_ar_*.yaml")), ids=lambda path: path.stem)
def test_generators_of_seed_voken_train_in_one_group(path: Path) -> None:
    """Their annealer writes the decay into every group; Hita's does not."""
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]["optimizer"]
    is_theirs = path.stem.startswith(("ibq", "open_magvit2"))
    assert (settings.get("decayed") == "all") is is_theirs

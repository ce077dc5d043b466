"""Initial weights have the mean and the deviation of the official ones, kind by kind, at the
published width.

A recording has one run of the official initialisation: by official name, with indices as `*`. Ours
is written under the official names by the importers' way back, then compared.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessellar.cli.recipes import read_recorded
from tessellar.models.alitok import AliTokAR
from tessellar.models.alitok.official import to_official as alitok_to_official
from tessellar.models.bitdance import BitDance
from tessellar.models.bitdance.official import to_official as bitdance_to_official
from tessellar.models.har import HAR
from tessellar.models.har.official import to_official as har_to_official
from tessellar.models.hita import HitaAR
from tessellar.models.hita.official import to_official as hita_to_official
from tessellar.models.ibq import IBQAR
from tessellar.models.ibq.official import to_official as ibq_to_official
from tessellar.models.llamagen import LlamaGen
from tessellar.models.llamagen.official import to_official as llamagen_to_official
from tessellar.models.lpd import LPD
from tessellar.models.lpd.official import to_official as lpd_to_official
from tessellar.models.mar import MAR
from tessellar.models.mar.official import to_official as mar_to_official
from tessellar.models.maskgit import MaskGIT
from tessellar.models.maskgit.official import to_official as maskgit_to_official
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.open_magvit2.official import to_official as open_magvit2_to_official
from tessellar.models.rar import RAR
from tessellar.models.rar.official import to_official as rar_to_official
from tessellar.models.retok import ReToKGPT
from tessellar.models.retok.official import GPT_KEYS
from tessellar.models.tokenbridge import TokenBridge
from tessellar.models.tokenbridge.official import to_official as tokenbridge_to_official
from tessellar.models.var import VAR
from tessellar.models.var.official import to_official as var_to_official
from tessellar.models.xar import XAR
from tessellar.models.xar.official import to_official as xar_to_official
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Continuous,
    Factorized,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tests.recipes.frame import GOLDEN

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
FEW = 100_000  # values; below, the recorded deviation is itself noisy by 1 / sqrt(2 n)

Made = tuple[nn.Module, Callable[[Any], Mapping[str, Tensor]]]


def scales(sides: tuple[int, ...]) -> Layout:
    return Layout(tuple(Segment((side, side), Categorical(4096), f"scale{side}") for side in sides))


def var(width: int, sides: tuple[int, ...], **options: Any) -> Made:
    return VAR(scales(sides), width, 2, width // 64, **options), var_to_official


def llama(system: str) -> Made:
    match system:
        case "llamagen":
            return LlamaGen(
                grid_layout(16, 16, Categorical(16384)), 768, 2, 12
            ), llamagen_to_official
        case "restok":
            return HAR(sequence_layout(128, Categorical(8192)), 1024, 2, 16), har_to_official
        case "hita":
            holistic = Segment((128,), Categorical(16384), "holistic")
            layout = Layout((holistic, Segment((21, 21), Categorical(16384), "patches")))
            return HitaAR(layout, 768, 2, 12), hita_to_official
        case _:
            generator = ReToKGPT(sequence_layout(256, Categorical(16384)), 768, 2, 12)
            return generator, lambda made: GPT_KEYS.to_official(made.state_dict())


def alitok(width: int) -> Made:
    kind = Categorical(4096)
    layout = Layout((Segment((17,), kind, "prefix"), Segment((16, 16), kind, "patches")))
    return AliTokAR(layout, width, 2, 16), alitok_to_official


def seed_voken(part: str) -> Made:
    """Of the part's width and start of gates, two blocks deep."""
    model, _, size = part.partition("_")
    width = {"b": 1024, "l": 1280, "xl": 1536, "xxl": 1920}[size]
    if model == "magvit2":
        layout = grid_layout(16, 16, Factorized((64, 4096)))
        return OpenMAGVIT2AR(layout, width, 2, width // 64, 2), open_magvit2_to_official
    gate = {"b": 1e-3, "l": 1e-3, "xl": 1e-4, "xxl": 1e-5}[size]
    layout = grid_layout(16, 16, Categorical(16384))
    made = IBQAR(layout, width, 2, width // 64, gate_scale=gate)
    return made, ibq_to_official


def width_of(config: Mapping[str, Any]) -> int:
    """The width that a run's official options name; 0 where they name none."""
    names = ("hidden_size", "decoder_embed_dim")
    return next((config[name] for name in names if name in config), 0)


def make(system: str, part: str, width: int) -> Made:
    """Our generator with the sizes of the recorded run, and its way to official names."""
    latents = grid_layout(16, 16, Continuous(16))
    match system, part:
        case "titok_rar", _:
            return RAR(grid_layout(16, 16, Categorical(1024)), 768, 2), rar_to_official
        case "titok_maskgit", "generator_vit":
            return MaskGIT(
                sequence_layout(64, Categorical(4096)), "vit", 768, 2
            ), maskgit_to_official
        case "titok_maskgit", _:
            layout = sequence_layout(128, Categorical(4096))
            return MaskGIT(layout, "uvit", 1024, 2, 16, 4096), maskgit_to_official
        case "lpd", _:
            grid = grid_layout(16, 16, Categorical(16384))
            return LPD(grid, width, 2, width // 64), lpd_to_official
        case "alitok", _:
            return alitok(width)
        case "bitdance" | "bitdance_parallel", _:
            patch = 1 if system == "bitdance" else 2
            sizes: dict[str, Any] = {"head_depth": 2, "head_groups": 2, "patch": patch}
            grid = grid_layout(16, 16, Bits(32))
            return BitDance(grid, 768, 2, 12, **sizes), bitdance_to_official
        case "seed_voken", _:
            return seed_voken(part)
        case "mar", _:
            return MAR(latents, 768, 2, 12, head_width=1024, head_depth=2), mar_to_official
        case "tokenbridge", _:
            width = 1024 if part == "generator_l" else 1280
            made = TokenBridge(
                grid_layout(16, 16, Factorized((32,) * 16)),
                width,
                depth=2,
                num_heads=16,
                head_width=1024,
                head_depth=2,
            )
            return made, tokenbridge_to_official
        case "xar", _:
            return XAR(latents, "cell:8x8", 768, 2, 12), xar_to_official
        case "var", "generator_d16" | "generator_d20":
            return var(1024 if part.endswith("16") else 1280, SCALES_256)
        case "var", "generator_d24":
            return var(1536, SCALES_256, gate_init=1e-4)
        case "var", "generator_d30":
            return var(1920, SCALES_256, gate_init=1e-5)
        case "var", _:
            return var(2304, SCALES_512, gate_init=5e-6, shared_modulation=True)
        case _:
            return llama(system)


# Official kinds that our weights have under another shape, or not at all.
SLICED = re.compile(r"(.*?)(\[.*\])$")
SYSTEMS = (
    "llamagen",
    "titok_rar",
    "titok_maskgit",
    "mar",
    "tokenbridge",
    "xar",
    "var",
    "restok",
    "hita",
    "retok",
    "alitok",
    "lpd",
    "bitdance",
    "bitdance_parallel",
    "seed_voken",
)


OF_SEED_VOKEN = tuple(f"{name}_{size}" for name in ("ibq", "magvit2") for size in "blx")
"""Its recording names parts by their model."""


def runs(system: str) -> list[tuple[str, str, str]]:
    """System, part and variant of every recorded run of an initialisation; most parts have one, of
    no name.
    """
    found = []
    for part, facts in read_recorded(GOLDEN, system)["parts"].items():
        if not part.startswith(("generator", *OF_SEED_VOKEN)):
            continue
        init = facts["init"]
        if init.get("params", True) is None:  # it goes on from another part
            continue
        variants = [""] if "params" in init else sorted(init)
        found += [(system, part, variant) for variant in variants]
    return found


RUNS = [run for system in SYSTEMS for run in runs(system)]


def kinds(state: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Tensors by official name with indices as `*`."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(tensor)
    return found


def chosen(tensors: list[Tensor], what: str, width: int) -> Tensor:
    """The values of a kind; `what` is the recorded slice of it: gates (the first two of six) or the
    rest.
    """
    match what:
        case "[:2C]":
            tensors = [tensor[: 2 * width] for tensor in tensors]
        case "[2C:]":
            tensors = [tensor[2 * width :] for tensor in tensors]
        case "[:,:,:2]":
            tensors = [tensor[:, :, :2] for tensor in tensors]
        case "[:,:,2:]":
            tensors = [tensor[:, :, 2:] for tensor in tensors]
    return torch.cat([tensor.flatten().float() for tensor in tensors])


LARGE = ("generator_d36_s", "generator_d30", "ibq_xxl")
STARTED = [
    pytest.param(*run, marks=pytest.mark.long if set(LARGE) & set(run) else ()) for run in RUNS
]


@pytest.mark.parametrize(("system", "part", "variant"), STARTED)
def test_initial_weights_are_the_official_ones(system: str, part: str, variant: str) -> None:
    recorded = read_recorded(GOLDEN, system)["parts"][part]["init"]
    recorded = recorded[variant] if variant else recorded
    torch.manual_seed(0)
    generator, to_official = make(system, part, width_of(recorded["config"]))
    ours = kinds(to_official(generator))
    wrong, compared = [], set()
    for kind, facts in recorded["params"].items():
        match = SLICED.match(kind)
        name, what = (match[1], match[2]) if match else (kind, "")
        compared.add(name)
        values = chosen(ours[name], what, recorded["config"].get("embed_dim", 0))
        mean, std = float(values.mean()), float(values.std(correction=0))
        share = 0.03 if len(values) >= FEW else 0.03 + 6 / math.sqrt(2 * len(values))
        noise = 6 * facts["std"] / math.sqrt(len(values)) + 1e-6 * abs(facts["mean"])
        if abs(std - facts["std"]) > share * facts["std"] + 1e-6 * abs(facts["mean"]) or abs(
            mean - facts["mean"]
        ) > 2 * noise + 1e-3 * abs(mean):
            wrong.append(
                f"{kind}: {mean:.3g} +- {std:.4g}, official {facts['mean']:.3g} +- {facts['std']:.4g}"
            )
    assert wrong == []
    assert sorted(set(ours) - compared) == [], "kinds that the recording does not know"

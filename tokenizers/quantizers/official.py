"""Quantizers of public libraries: their options and keys to ours and back.

`lucid` is vector-quantize-pytorch. Its EMA codebooks carry a leading axis of heads, which is 1 in
all that is read here. Our own counters start at zero.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.quantizers.bsq import BSQ
from tessellar.tokenizers.quantizers.ema_vq import EMAVectorQuantizer
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.product_vq import ProductQuantizer
from tessellar.tokenizers.quantizers.projected import Projected
from tessellar.tokenizers.quantizers.residual_vq import ResidualQuantizer
from tessellar.tokenizers.quantizers.simvq import SimVQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

Q = TypeVar("Q", bound=Quantizer)
Config = Mapping[str, Any]


def without_heads(t: Tensor) -> Tensor:
    if t.shape[0] != 1:
        raise UserError(f"a codebook has {t.shape[0]} heads; only one can be imported")
    return t[0]


def with_heads(t: Tensor) -> Tensor:
    return t[None]


def _lucid_codebook(theirs: str, ours: str) -> tuple[Rule, ...]:
    names = {"embed": "codebook.weight", "embed_avg": "sums", "cluster_size": "sizes"}
    rules = []
    for a, b in names.items():
        rules.append(Rule(f"{theirs}_codebook.{a}", f"{ours}{b}", without_heads, with_heads))
    return tuple(rules)


CODEBOOK = table({"embedding.weight": "codebook.weight"}, drop=("codebook_used",))
SIMVQ = table(
    {"embedding.weight": "codebook.weight", "embedding_proj.{tensor}": "projection.{tensor}"}
)
LUCID_SIMVQ = table(
    {"frozen_codebook": "codebook.weight", "code_transform.{tensor}": "projection.{tensor}"}
)
LUCID_EMA = table({}, *_lucid_codebook("", ""), drop=("_codebook.initted",))
LUCID_RESIDUAL = table(
    {},
    _lucid_codebook("layers.{i}.", "layers.{i}.")[0],
    drop=tuple(
        f"layers.{{i}}._codebook.{name}" for name in ("initted", "embed_avg", "cluster_size")
    ),
)
LUCID_GROUPED = table(
    {},
    *_lucid_codebook("rvqs.{g}.layers.{i}.", "groups.{g}.layers.{i}."),
    drop=("rvqs.{g}.layers.{i}._codebook.initted",),
)
PRODUCT = table(
    {"codebooks.{i}.codebook.weight": "groups.{i}.codebook.weight"},
    drop=("codebooks.{i}.vocab_usage*",),
)
PROJECTED = table(
    {"project_in.{tensor}": "project_in.{tensor}", "project_out.{tensor}": "project_out.{tensor}"}
)
OWN = ("step", "counts")


def load_official(
    quantizer: Q, keys: KeyTable, state: Mapping[str, Tensor], where: str = "the quantizer"
) -> Q:
    """Official weights into a quantizer of the same sizes, strictly."""
    counters = {}
    for name, tensor in quantizer.state_dict().items():
        if name.rsplit(".", 1)[-1] in OWN:
            counters[name] = torch.zeros_like(tensor)
    load_strict(quantizer, {**keys.from_official(state, where), **counters}, where)
    return quantizer


def to_official(quantizer: Quantizer, keys: KeyTable) -> dict[str, Tensor]:
    """Official state dict of a quantizer."""
    state = quantizer.state_dict()
    for name in [name for name in state if name.rsplit(".", 1)[-1] in OWN]:
        del state[name]
    return keys.to_official(state)


def taming(config: Config) -> VectorQuantizer:
    """VectorQuantizer2 of taming-transformers; `legacy`, their default, puts beta on the codebook's
    term.
    """
    beta = config["beta"]
    legacy = config.get("legacy", True)
    codebook, commitment = (beta, 1.0) if legacy else (1.0, beta)
    return VectorQuantizer(config["n_e"], config["e_dim"], False, codebook, commitment)


def llamagen(config: Config) -> VectorQuantizer:
    ratio = config.get("entropy_loss_ratio", 0.0)
    return VectorQuantizer(
        config["n_e"], config["e_dim"], config.get("l2_norm", True), 1.0, config["beta"], ratio
    )


def simvq(config: Config) -> SimVQ:
    """The official SimVQ, with taming's two orders of beta."""
    codebook, commitment = (
        (config["beta"], 1.0) if config.get("legacy", True) else (1.0, config["beta"])
    )
    return SimVQ(config["n_e"], config["e_dim"], codebook, commitment)


def lucid_simvq(config: Config) -> SimVQ:
    weight = config.get("commitment_weight", 1.0)
    beta = weight * config.get("input_to_quantize_commit_loss_weight", 0.25)
    rotation = config.get("rotation_trick", True)
    return SimVQ(
        config["codebook_size"], config["dim"], weight, beta, rotation=rotation, bias=False
    )


def lucid_ema(config: Config) -> EMAVectorQuantizer:
    """VectorQuantize with its defaults, where a config is silent."""
    return EMAVectorQuantizer(
        config["codebook_size"],
        config["dim"],
        config.get("use_cosine_sim", False),
        config.get("commitment_weight", 1.0),
        config.get("decay", 0.8),
        config.get("threshold_ema_dead_code", 0),
        rotation=config.get("rotation_trick", True),
    )


def lucid_residual(config: Config) -> ResidualQuantizer:
    """ResidualVQ: learned codebooks (one loss, so one weight for both terms), or EMA ones."""

    def layer() -> Quantizer:
        if not config.get("learnable_codebook", False):
            return lucid_ema(config)
        weight = config.get("commitment_weight", 1.0)
        rotation = config.get("rotation_trick", True)
        return VectorQuantizer(
            config["codebook_size"], config["dim"], False, weight, weight, rotation=rotation
        )

    return ResidualQuantizer(
        tuple(layer() for _ in range(config["num_quantizers"])), pass_each=True
    )


def lucid_grouped_residual(config: Config) -> ProductQuantizer:
    groups = config["groups"]
    each = {**config, "dim": config["dim"] // groups}
    return ProductQuantizer(tuple(lucid_residual(each) for _ in range(groups)))


def lucid_lfq(config: Config) -> Quantizer:
    """LFQ, on the sphere (BSQ) with `spherical`, between projections where channels differ."""
    groups = config.get("num_codebooks", 1)
    bits = (config["codebook_size"] - 1).bit_length()
    dim = bits * groups
    wanted = config.get("dim", bits * groups)
    made = (
        spherical_bsq(dim, config)
        if config.get("spherical", False)
        else grouped_lfq(dim, groups, config)
    )
    return made if dim == wanted else Projected(made, wanted)


def grouped_lfq(dim: int, groups: int, config: Config) -> LFQ:
    return LFQ(
        dim,
        groups,
        entropy_weight=config.get("entropy_loss_weight", 0.1),
        commitment_weight=config.get("commitment_loss_weight", 0.0),
        diversity=config.get("diversity_gamma", 1.0),
        temperature=1 / config.get("inv_temperature", 100.0),
        shared_histogram=False,
        entropy_guard="clamp",
        big_endian=True,
    )


def spherical_bsq(dim: int, config: Config) -> BSQ:
    """Their commitment is a mean over channels, their entropy term not divided by the inverse
    temperature.
    """
    inv_temperature = config.get("inv_temperature", 100.0)
    return BSQ(
        dim,
        dim,
        "index",
        commitment_weight=config.get("commitment_loss_weight", 0.0) / dim,
        entropy_weight=config.get("entropy_loss_weight", 0.1) * inv_temperature,
        diversity=config.get("diversity_gamma", 1.0),
        inv_temperature=inv_temperature,
        analytical=False,
        scaled_gradient=False,
        entropy_guard="clamp",
    )


def magvit_lfq(config: Config) -> LFQ:
    """LFQ of SEED-Voken, and WeTok's with groups."""
    return LFQ(
        config["dim"],
        config.get("num_codebooks", 1),
        entropy_weight=config.get("codebook_weight", 0.0),
        commitment_weight=config.get("commit_weight", 0.0),
        temperature=config.get("temperature", 0.01),
    )


def official_bsq(config: Config, form: str = "index", split: tuple[int, ...] | None = None) -> BSQ:
    """BinarySphericalQuantizer of BSQ-ViT."""
    if not config.get("l2_norm", True):
        raise UserError("a BSQ without l2_norm is not on the sphere and cannot be imported")
    return BSQ(
        config["embed_dim"],
        config["group_size"],
        form=form,
        split=split,
        commitment_weight=config["beta"],
        entropy_weight=config["zeta"],
        sample_weight=config["gamma0"],
        diversity=config["gamma"],
        inv_temperature=config.get("inv_temperature", 1.0),
        analytical=config["persample_entropy_compute"] == "analytical",
    )


def unitok(config: Config, entropy_weight: float = 0.1) -> ProductQuantizer:
    """VectorQuantizerM of UniTok."""
    count = config["num_codebooks"]
    vocab = config["vocab_size"] // count
    dim = config["vocab_width"] // count
    options = (1.0, config["beta"], entropy_weight, config.get("entropy_temp", 0.01))
    return ProductQuantizer(
        tuple(VectorQuantizer(vocab, dim, True, *options) for _ in range(count))
    )

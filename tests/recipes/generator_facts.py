"""Facts of a built generator that its YAML alone does not say: dropouts, losses, how its training is drawn."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

from torch import nn

from tessellar.cli.recipes import Facts, Recipe
from tessellar.models.alitok import AliTokAR
from tessellar.models.arpg import ARPG
from tessellar.models.bar import BAR
from tessellar.models.bitdance import BitDance
from tessellar.models.har import HAR
from tessellar.models.hita import HitaAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.lpd import LPD
from tessellar.models.mar import MAR
from tessellar.models.maskgit import MaskGIT
from tessellar.models.mingtok import MingTokAR
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.randar import RandAR
from tessellar.models.rar import RAR
from tessellar.models.retok import ReToKGPT
from tessellar.models.semanticist import SemanticistAR
from tessellar.models.tokenbridge import TokenBridge
from tessellar.models.var import VAR
from tessellar.models.xar import XAR

PLAIN = {"losses.cross_entropy.weight": 1.0, "losses.cross_entropy.label_smoothing": 0.0}


def generator_facts(generator: nn.Module, recipe: Recipe) -> Facts:
    """Facts of a generator, as its recording names them."""
    return {
        "dropout.label": generator.condition_dropout,
        **_facts(generator),
        **order_facts(recipe),
    }


def order_facts(recipe: Recipe) -> Facts:
    """When orders are random, of a recipe that anneals them: [update, share] at the ends of each line."""
    for callback in recipe.config["trainer"].get("callbacks", ()):
        if callback["class_path"].endswith(".OrderAnnealing"):
            start, end = callback["init_args"]["start"], callback["init_args"]["end"]
            return {"order.r": [[0, 1.0], [start, 1.0], [end, 0.0], [recipe.updates, 0.0]]}
    return {}


@singledispatch
def _facts(generator: nn.Module) -> Facts:
    raise NotImplementedError(f"no facts of {type(generator).__name__}: write them here")


def the_one(modules: Any, value: Callable[[Any], Any]) -> Any:
    """What all modules say; several answers are given as a list, which equals nothing recorded."""
    answers = sorted({value(module) for module in modules})
    return answers[0] if len(answers) == 1 else answers


def llama_facts(generator: Any) -> Facts:
    """Of LlamaGen's kind: one residual dropout follows attention and feed-forward."""
    residual = the_one(generator.layers, lambda layer: layer.dropout.p)
    return {
        "dropout.token": generator.embedding_dropout.p,
        "dropout.residual": residual,
        "dropout.feed_forward": residual,
        "dropout.attention": the_one(generator.layers, lambda layer: layer.attention.dropout),
        "dropout.drop_path": the_one(generator.layers, lambda layer: layer.drop_path.rate),
        **PLAIN,
    }


@_facts.register(AliTokAR)
@_facts.register(LlamaGen)
@_facts.register(HAR)
@_facts.register(RandAR)
@_facts.register(ReToKGPT)
def _(generator: Any) -> Facts:
    return llama_facts(generator)


@_facts.register
def _(generator: HitaAR) -> Facts:
    names = (
        "cross_entropy_holistic",
        "cross_entropy_patches",
    )  # losses `holistic` and `patches`, summed
    return {**llama_facts(generator), **{f"losses.{name}.weight": 1.0 for name in names}}


@_facts.register
def _(generator: OpenMAGVIT2AR) -> Facts:
    inner: Any = generator.intra.layers
    facts = llama_facts(generator)
    if {layer.dropout.p for layer in inner} != {facts["dropout.residual"]}:
        facts["dropout.residual"] = "another one inside of tokens"
    return facts


@_facts.register
def _(generator: ARPG) -> Facts:
    blocks: Any = [*generator.layers, *generator.cross_layers]
    inner = the_one(blocks, lambda block: block.dropout.p)
    return {"dropout.residual": inner, "dropout.feed_forward": inner, **PLAIN}


@_facts.register
def _(generator: LPD) -> Facts:
    layers: Any = generator.layers
    inner = {*(layer.dropout.p for layer in layers), *(layer.attention.dropout for layer in layers)}
    return {
        "dropout.attention_projection_and_mlp": the_one(inner, float),
        "dropout.attention": the_one(layers, lambda layer: layer.attention.weight_dropout),
        **PLAIN,
    }


@_facts.register
def _(generator: RAR) -> Facts:
    layers: Any = generator.layers
    inner = {
        *(layer.dropout.p for layer in layers),
        *(layer.attention.dropout for layer in layers),
    }
    return {
        "dropout.attention_projection_and_mlp": the_one(inner, float),
        "dropout.attention": the_one(layers, lambda layer: layer.attention.dropout),
        "dropout.drop_path": 0.0,
        **PLAIN,
    }


@_facts.register
def _(generator: BAR) -> Facts:
    layers: Any = generator.layers
    inner = {
        *(layer.dropout.p for layer in layers),
        *(layer.attention.dropout for layer in layers),
    }
    return {
        "dropout.blocks": the_one(inner, float),
        "losses.cross_entropy.weight": 1.0,
        "losses.cross_entropy.weight_masked": 1.0,
        "losses.cross_entropy.weight_unmasked": generator.known_weight,
    }


@_facts.register
def _(generator: MaskGIT) -> Facts:
    layers: Any = generator.backbone.layers
    return {
        "dropout.hidden": the_one((generator.backbone, *layers), lambda layer: layer.dropout.p),
        "dropout.attention": the_one(layers, lambda layer: layer.rate),
        "dropout.drop_path": 0.0,
        "losses.cross_entropy.weight": 1.0,
        "losses.cross_entropy.label_smoothing": generator.label_smoothing,
        "losses.cross_entropy.weight_masked": 1.0,
        "losses.cross_entropy.weight_unmasked": generator.known_weight,
    }


@_facts.register
def _(generator: MAR) -> Facts:
    blocks: Any = [*generator.backbone.encoder_blocks, *generator.backbone.decoder_blocks]
    inner = {
        *(b.attn.proj_drop.p for b in blocks),
        *(b.mlp.drop1.p for b in blocks),
        *(b.mlp.drop2.p for b in blocks),
    }
    return {
        "dropout.attention": the_one(blocks, lambda block: block.attn.attn_drop.p),
        "dropout.projection_and_mlp": the_one(inner, float),
        "dropout.drop_path": the_one(
            blocks, lambda block: float(isinstance(block.drop_path1, nn.Identity) is False)
        ),
        "losses.diffusion.weight": 1.0,
        "losses.diffusion.repeats": generator.repeats,
        "least_masked": generator.least_masked,
    }


@_facts.register
def _(generator: TokenBridge) -> Facts:
    blocks: Any = [*generator.backbone.encoder_blocks, *generator.backbone.decoder_blocks]
    head: Any = generator.head.blocks
    attention = {*(b.attn.attn_drop.p for b in blocks), *(b.attention.dropout for b in head)}
    inner = {
        *(b.attn.proj_drop.p for b in blocks),
        *(b.mlp.drop1.p for b in blocks),
        *(b.mlp.drop2.p for b in blocks),
        *(b.dropout.p for b in head),
    }
    return {
        "dropout.attention": the_one(attention, float),
        "dropout.projection_and_mlp": the_one(inner, float),
        "dropout.drop_path": 0.0,
        "losses.cross_entropy.weight": 1.0,
        "least_masked": generator.least_masked,
    }


@_facts.register
def _(generator: BitDance) -> Facts:
    dropouts = {module.p for module in generator.modules() if isinstance(module, nn.Dropout)}
    return {
        "dropout.all": the_one(dropouts, float),
        "losses.flow.weight": 1.0,
        "losses.flow.repeats": generator.repeats,
    }


@_facts.register
def _(generator: XAR) -> Facts:
    blocks: Any = [*generator.encoder.blocks, *generator.decoder.blocks]
    inner = {*(b.dropout.p for b in blocks), *(b.mlp.dropout.p for b in blocks)}
    return {
        "dropout.attention": the_one(blocks, lambda block: block.attention.dropout),
        "dropout.projection_and_mlp": the_one(inner, float),
        "dropout.drop_path": 0.0,
        "losses.flow.weight": 1.0,
    }


@_facts.register
def _(generator: MingTokAR) -> Facts:
    return {"repeats": generator.repeats, "losses.flow.weight": 1.0}


@_facts.register
def _(generator: SemanticistAR) -> Facts:
    residual = the_one(generator.layers, lambda layer: layer.dropout.p)  # type: ignore[attr-defined]
    return {
        "dropout.token": getattr(generator.embedding_dropout, "p", 0.0),
        "dropout.residual": residual,
        "dropout.feed_forward": residual,
        "positions": generator.layout.length,
        "repeats": generator.repeats,
        "losses.flow.weight": 1.0,
    }


@_facts.register
def _(generator: VAR) -> Facts:
    rates = [layer.dropout.rate for layer in generator.layers]  # type: ignore[union-attr]
    last = rates[-1]
    is_linear = all(abs(rate - last * i / (len(rates) - 1)) < 1e-9 for i, rate in enumerate(rates))
    return {
        "dropout.all": the_one(
            [m for m in generator.modules() if isinstance(m, nn.Dropout)], lambda m: m.p
        ),
        "dropout.drop_path.rate": round(last, 6),
        "dropout.drop_path.over_depth": "linear 0 .. rate" if is_linear else rates,
        **PLAIN,
    }

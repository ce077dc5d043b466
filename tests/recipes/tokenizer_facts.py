"""Facts of a tokenizer's recipe that its optimizer and data do not say: losses of both players, read from the YAML.

Weights are given as official code has them, of images in [0, 1] where it trains on those: a squared error of images in
[-1, 1], as ours, is four times as large.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from tessellar.cli.recipes import IMAGES, Facts, Recipe, optimizer_facts, schedule_facts
from tessellar.layers.gated_block import GatedAttention
from tessellar.tokenizers.losses.diff_augment import DiffAugment
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.rectok import ChannelBottleneck
from tessellar.tokenizers.semanticist import Semanticist

UNIT_RANGE = (
    "titok",
    "one_d_piece",
    "restok",
    "alitok",
    "rectok",
)  # systems whose official losses see images in [0, 1]


def discriminator_facts(recipe: Recipe, system: str) -> Facts:
    """Optimizer, schedule on its own clock, clipping and losses of the discriminator."""
    loss, key = arguments(recipe.model["loss"]), "discriminator_schedule"
    settings = recipe.optimizer(
        "discriminator_optimizer" if "discriminator_optimizer" in recipe.model else "optimizer"
    )
    start = loss.get("adversarial_start", 20_000)
    schedule = recipe.schedule(key if key in recipe.model else "schedule")
    own = key in recipe.model and schedule.decay != "constant"  # a constant has no clock
    weight = loss.get("discriminator_weight", loss.get("adversarial_weight", 0.5))
    facts = {
        **optimizer_facts(settings, recipe.global_batch),
        **schedule_facts(schedule, settings, recipe.updates - start if own else recipe.updates),
        "grad_clip": recipe.model.get("clip", 1.0) or "none",
        "ema": "none",
        # A mean of two terms here and mostly there; vaex adds them.
        "losses.hinge.weight": weight / 2 if system == "var" else weight,
        "losses.hinge.start": start,
    }
    facts |= shares(loss, recipe) | _augment(loss) | {"losses.lecam.weight": 0.0}
    if "lecam" in loss:
        lecam = arguments(loss["lecam"])
        facts |= {
            "losses.lecam.weight": lecam.get("weight", 0.001),
            "losses.lecam.ema": lecam.get("decay", 0.999),
            "losses.lecam.ema_start": 0.0,
            "losses.lecam.ema_updated": "after use",
            "losses.lecam.start": start,
        }
    if "consistency" in loss:
        facts["losses.bcr.weight"] = weight * loss["consistency"]
    return facts


def tokenizer_facts(recipe: Recipe, tokenizer: Any, system: str) -> Facts:
    """Losses of the tokenizer: pixels, perceptual, adversarial, and those of its own quantizer and teacher."""
    loss = arguments(recipe.model["loss"])
    pixels = {"l1": 0.0, "l2": 1.0, **loss.get("reconstruction", {})}
    squared = pixels["l2"] * (4 if system in UNIT_RANGE else 1)
    distances = perceptual_weights(loss)
    first = recipe.model.get("discriminator_first", False)
    players = ["discriminator", "generator"] if first else ["generator", "discriminator"]
    facts: Facts = {
        "update_order": ", then ".join(players),
        "losses.reconstruction.weight": squared or pixels["l1"],
        "losses.l1.weight": pixels["l1"],
        "losses.l2.weight": pixels["l2"],
        "losses.perceptual.weight": distances.get("LogitDistance", distances.get("LPIPS")),
        "losses.lpips.weight": distances.get("LPIPS"),
        "losses.gram.weight": distances.get("GramDistance"),
        "losses.alignment.weight": getattr(tokenizer, "alignment_weight", None),
        **_adversarial(loss, recipe),
        **_own(tokenizer),
        **_training(tokenizer),
    }
    quantizer = getattr(tokenizer, "quantizer", None)
    if isinstance(quantizer, ChannelBottleneck):
        facts["losses.kl.weight"] = quantizer.kl_weight  # of an image's sum, as there
    elif isinstance(quantizer, GaussianBottleneck):
        latents = tokenizer.layout.length * tokenizer.quantizer.dim
        height, width = tokenizer.image_size
        # Of sums over latents; where the likeness is officially a sum over pixels too, both are of one scale.
        values = 3 * height * width if facts.get("adaptive.summed") else 1
        facts["losses.kl.weight"] = tokenizer.quantizer.kl_weight / latents * values
        facts["losses.nll.weight"] = (
            pixels["l1"] if pixels["l1"] == facts["losses.lpips.weight"] else None
        )
    return facts


def _adversarial(loss: Mapping[str, Any], recipe: Recipe) -> Facts:
    if "discriminator" not in loss:
        return {}
    adaptive = loss.get("adaptive", False)
    facts: Facts = {
        "losses.adversarial.weight": loss.get("adversarial_weight", 0.5),
        "losses.adversarial.start": loss.get("adversarial_start", 20_000),
        "losses.adversarial.adaptive": bool(adaptive),
        **shares(loss, recipe),
    }
    if isinstance(adaptive, Mapping):
        bounds = [adaptive.get("lowest", 0.0), adaptive.get("highest", 1e4)]
        facts |= {
            "adaptive.summed": adaptive.get("summed", False),
            "adaptive.eps": adaptive.get("eps", 1e-4),
            "losses.adversarial.adaptive.clamp": bounds,
        }
    return facts


def shares(loss: Mapping[str, Any], recipe: Recipe) -> Facts:
    """Start, warm-up and blur of the adversarial part as shares of the run."""
    onset = loss.get("onset", {})
    updates = {
        "start": loss.get("adversarial_start", 20_000),
        "warmup": onset.get("warmup", 0),
        "blur": onset.get("blur", 0),
    }
    return {f"share.{name}": value / recipe.updates for name, value in updates.items()}


def _augment(loss: Mapping[str, Any]) -> Facts:
    """What the discriminator's augmentation does."""
    described = arguments(loss["discriminator"]).get("augment")
    if described is None:
        return {}
    augment = DiffAugment(**arguments(described))
    names = ("probability", "cutout", "unit_range", "order")
    return {f"augment.{name}": getattr(augment, name) for name in names}


def _own(tokenizer: Any) -> Facts:
    """Losses that the tokenizer itself names; in stage "decoder" the quantizer's are left out."""
    quantizer = getattr(tokenizer, "quantizer", None)
    parts = getattr(quantizer, "quantizers", None) or [quantizer]
    first = parts[0]
    facts: Facts = {
        "losses.quantizer.weight": 0.0 if getattr(tokenizer, "stage", "all") == "decoder" else 1.0,
        "losses.proxy_cross_entropy.weight": 1.0,
        "losses.vision.weight": getattr(
            tokenizer, "vision_weight", getattr(tokenizer, "vision_loss", None)
        ),
        "losses.vision.margin": getattr(tokenizer, "vision_margin", None),
        "losses.prefix.weight": getattr(tokenizer, "prefix_weight", None),
        "losses.projection.weight": getattr(tokenizer, "semantic_weight", None),
        "losses.semantic.weight": getattr(tokenizer, "semantic_weight", None),
        "losses.feature.weight": getattr(tokenizer, "feature_weight", None),
        "losses.feature.end": getattr(tokenizer, "feature_steps", None),
        "quantizer.clustering_vq": type(first).__name__ == "ClusteringVQ",
        "quantizer.l2_norm": getattr(first, "l2_normalize", None),
    }
    if isinstance(first, IBQ):
        return facts | {
            "losses.quant.weight": first.quantization_weight,
            "losses.quant.commitment": first.codebook_weight,  # beta, of the codebook's term here
            "losses.entropy.weight": first.entropy_weight,
            "losses.entropy.temperature": first.temperature,
        }
    if isinstance(first, LFQ):
        return facts | {
            "losses.commitment.weight": first.commitment_weight,
            "losses.entropy.weight": first.entropy_weight,
            "losses.entropy.sample": 1.0,
            "losses.entropy.batch": first.diversity,
        }
    if hasattr(first, "codebook_weight"):
        facts |= {
            "losses.codebook.weight": first.codebook_weight,
            "losses.vq.weight": first.codebook_weight,
            "losses.commitment.weight": first.commitment_weight,
            "losses.vq.commitment": first.commitment_weight,
            "losses.entropy.weight": getattr(first, "entropy_weight", 0.0),
        }
    return facts


def _training(tokenizer: Any) -> Facts:
    """What is trained, dropped and kept in training."""
    rates = [part.p for part in tokenizer.modules() if isinstance(part, nn.Dropout)]
    rate = max(rates, default=0.0)
    blocks: Any = [part for part in tokenizer.modules() if isinstance(part, GatedAttention)]
    facts: Facts = {
        "dropout.all": rate,
        "dropout.cnn": rate,
        "dropout.transformers": max([rate, *(part.rate for part in blocks)]),
        "dropout.drop_path": "not used by the CNN",
        "masked": getattr(tokenizer, "masked", None),
        "gamma": getattr(tokenizer, "gamma", None),
        "dropout.scale": getattr(getattr(tokenizer, "quantizer", None), "scale_dropout", None),
        "trained": sorted(
            {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.requires_grad}
        ),
        "losses.flow.weight": 1.0,
    }
    if isinstance(tokenizer, Semanticist):
        how = tokenizer.training_settings
        facts |= {
            "dropout.drop_path": max(block.drop_path.rate for block in tokenizer.encoder.blocks),
            "nested.null": how.null,
            "nested.from_epoch": how.nested_after / (IMAGES // 2048),
            "nested.shortest": 1,
            "nested.longest": tokenizer.num_slots,
            "losses.diffusion.weight": 1.0,
            "losses.bound.weight": 1.0,
            "losses.repa.weight": how.repa_weight,
        }
    if hasattr(tokenizer, "drop"):
        facts |= {
            "tail_drop.shortest": tokenizer.drop.shortest,
            "tail_drop.longest": tokenizer.num_tokens,
        }
    if hasattr(tokenizer, "keeps"):
        least = min(tokenizer.keeps.values())
        facts |= {
            "dropout.nested.kept": list(tokenizer.keeps),
            "dropout.nested.weights": [round(share / least) for share in tokenizer.keeps.values()],
        }
    return facts


def perceptual_weights(loss: Mapping[str, Any]) -> dict[str, float]:
    """Class of each perceptual distance to its weight in the sum."""
    if "perceptual" not in loss:
        return {}
    whole = loss.get("perceptual_weight", 1.0)
    inner = arguments(loss["perceptual"])
    if "distances" in inner:
        weights = zip(inner["distances"], inner["weights"], strict=True)
        return {class_name(distance): whole * weight for distance, weight in weights}
    return {class_name(inner.get("distance", loss["perceptual"])): whole}


def class_name(described: Mapping[str, Any]) -> str:
    return described["class_path"].rpartition(".")[2]


def arguments(described: Mapping[str, Any]) -> Mapping[str, Any]:
    return described.get("init_args", {})

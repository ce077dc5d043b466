"""LlamaGen's VQ tokenizer and PatchGAN: official keys, and the replay of their recorded outputs."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.interop.importer import table
from tessellar.interop.weights import load_strict
from tessellar.tokenizers.base import TokenizerOutput
from tessellar.tokenizers.llamagen_vq import LlamaGenVQ
from tessellar.tokenizers.losses.adversarial import adaptive_weight, generator_adversarial
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer

_SIDE = {
    "{side}.conv_in.{tensor}": "{side}.conv_in.{tensor}",
    "{side}.conv_blocks.{i}.res.{j}.nin_shortcut.{tensor}": "{side}.levels.{i}.res.{j}.shortcut.{tensor}",
    "{side}.conv_blocks.{i}.res.{j}.{layer}.{tensor}": "{side}.levels.{i}.res.{j}.{layer}.{tensor}",
    "{side}.conv_blocks.{i}.attn.{j}.proj_out.{tensor}": "{side}.levels.{i}.attn.{j}.proj.{tensor}",
    "{side}.conv_blocks.{i}.attn.{j}.{layer}.{tensor}": "{side}.levels.{i}.attn.{j}.{layer}.{tensor}",
    "{side}.conv_blocks.{i}.downsample.conv.{tensor}": "{side}.levels.{i}.resample.conv.{tensor}",
    "{side}.conv_blocks.{i}.upsample.conv.{tensor}": "{side}.levels.{i}.resample.conv.{tensor}",
    "{side}.mid.{i}.proj_out.{tensor}": "{side}.mid.{i}.proj.{tensor}",
    "{side}.mid.{i}.{layer}.{tensor}": "{side}.mid.{i}.{layer}.{tensor}",
    "{side}.norm_out.{tensor}": "{side}.norm_out.{tensor}",
    "{side}.conv_out.{tensor}": "{side}.conv_out.{tensor}",
}


def _half(side: str) -> dict[str, str]:
    """The table of encoder or decoder; the way back must tell `downsample` from `upsample`."""
    other = "upsample" if side == "encoder" else "downsample"
    return {
        theirs.replace("{side}", side): ours.replace("{side}", side)
        for theirs, ours in _SIDE.items()
        if other not in theirs
    }


KEYS = table(
    {
        **_half("encoder"),
        **_half("decoder"),
        "quant_conv.{tensor}": "quant_conv.{tensor}",
        "post_quant_conv.{tensor}": "post_quant_conv.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
    },
    drop=("quantize.codebook_used",),
)
OWN_COUNTERS = ("quantizer.step", "quantizer.counts")


def load_official(tokenizer: LlamaGenVQ, state: Mapping[str, Tensor], where: str = "the checkpoint") -> LlamaGenVQ:
    """Official weights into a tokenizer of the same sizes, strictly; our own counters start at zero."""
    own = tokenizer.state_dict()
    counters = {name: torch.zeros_like(own[name]) for name in OWN_COUNTERS if name in own}
    load_strict(tokenizer, {**KEYS.from_official(state, where), **counters}, where)
    return tokenizer.eval()


def to_official(tokenizer: LlamaGenVQ) -> dict[str, Tensor]:
    """Official state dict of a tokenizer (without their queue of recent codes)."""
    return KEYS.to_official({k: v for k, v in tokenizer.state_dict().items() if k not in OWN_COUNTERS})


def tokenizer_from_official(state: Mapping[str, Tensor], image_size: int = 256) -> LlamaGenVQ:
    """A tokenizer with the sizes that the weights show, filled with them."""
    if "encoder.conv_in.weight" not in state or "quantize.embedding.weight" not in state:
        raise UserError(
            "these are not the weights of a LlamaGen VQ tokenizer: encoder.conv_in or the codebook is absent"
        )
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + _last(state, r"encoder\.conv_blocks\.(\d+)\.")
    widths = [state[f"encoder.conv_blocks.{i}.res.0.conv2.weight"].shape[0] for i in range(levels)]
    vocab, dim = state["quantize.embedding.weight"].shape
    tokenizer = LlamaGenVQ(
        VectorQuantizer(vocab, dim),
        image_size,
        channels,
        tuple(w // channels for w in widths),
        1 + _last(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        state["encoder.conv_out.weight"].shape[0],
    )
    return load_official(tokenizer, state)


def _last(state: Mapping[str, Tensor], pattern: str) -> int:
    return max(int(found[1]) for key in state if (found := re.match(pattern, key)))


def tokenizer_from_config(config: Mapping[str, Any], image_size: int) -> LlamaGenVQ:
    """An untrained tokenizer of the official options."""
    quantizer = VectorQuantizer(
        config["codebook_size"],
        config["codebook_embed_dim"],
        config.get("codebook_l2_norm", True),
        commitment_weight=config.get("commit_loss_beta", 0.25),
        entropy_weight=config.get("entropy_loss_ratio", 0.0),
    )
    return LlamaGenVQ(
        quantizer,
        image_size,
        config.get("ch", 128),
        tuple(config["ch_mult"]),
        config.get("num_res_blocks", 2),
        config["z_channels"],
    )


def discriminator_from_official(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PatchGAN:
    """The official PatchGAN; its keys are ours."""
    made = PatchGAN(config.get("ndf", 64), config.get("n_layers", 3), config.get("input_nc", 3))
    load_strict(made, state, "the discriminator")
    return made


def replay_vq(
    config: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    meanings: Mapping[str, str],
) -> dict[str, Tensor]:
    """All recorded outputs of the tokenizer, the discriminator and their losses."""
    images = inputs["vq/images"]
    tokenizer = tokenizer_from_config(config["vq"], images.shape[-1])
    load_official(tokenizer, weights["vq"])
    outputs = _tokenizer_outputs(tokenizer, images, inputs["vq/codes"])
    outputs |= _without_normalisation(tokenizer, config["vq"], images)
    outputs |= _training_losses(tokenizer, config, images)
    outputs |= _discriminator_outputs(config, weights["discriminator"], images)
    for adaptive in (False, True):
        outputs |= _gan_losses(config, weights, inputs, meanings, adaptive)
    return outputs


@torch.no_grad()
def _tokenizer_outputs(tokenizer: LlamaGenVQ, images: Tensor, codes: Tensor) -> dict[str, Tensor]:
    latents = tokenizer.latents(images)
    tokens = tokenizer.encode(images)
    quantized = tokenizer.quantizer.decode(tokens.view(latents.shape[:-1]))
    return {
        "vq/encoder_out": tokenizer.encoder(images),
        "vq/z_pre": rearrange(latents, "b h w c -> b c h w"),
        "vq/indices": tokens,
        "vq/quant": rearrange(quantized, "b h w c -> b c h w"),
        "vq/recon": tokenizer.decode(tokens),
        "vq/codes_image": tokenizer.decode(codes),
    }


@torch.no_grad()
def _without_normalisation(tokenizer: LlamaGenVQ, config: Mapping[str, Any], images: Tensor) -> dict[str, Tensor]:
    plain = VectorQuantizer(config["codebook_size"], config["codebook_embed_dim"], l2_normalize=False).eval()
    plain.load_state_dict(tokenizer.quantizer.state_dict())
    latents = tokenizer.latents(images)
    tokens = plain.encode(latents)
    quantized = rearrange(plain.decode(tokens), "b h w c -> b c h w")
    return {"vq/no_l2/indices": tokens.flatten(1), "vq/no_l2/quant": quantized}


def _training_losses(tokenizer: LlamaGenVQ, config: Mapping[str, Any], images: Tensor) -> dict[str, Tensor]:
    output = tokenizer.train()(images)
    tokenizer.eval()
    zero = torch.zeros(())
    return {
        "vq/train/vq_loss": output.losses["codebook"],
        "vq/train/commit_loss": output.losses["commitment"],
        "vq/train/entropy_loss": output.losses.get("entropy", zero),
        "vq/train/mse": Reconstruction(l2=1.0)(images, output.reconstruction)["l2"],
    }


@torch.no_grad()
def _discriminator_outputs(config: Mapping[str, Any], state: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    discriminator = discriminator_from_official(config["disc"], state)
    evaluated = discriminator.eval()(images)
    return {"disc/logits_eval": evaluated, "disc/logits_train": discriminator.train()(images)}


class Given(nn.Module):
    """A perceptual distance that was recorded instead of computed."""

    def __init__(self, distance: Tensor) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return self.distance


def loss_from_config(config: Mapping[str, Any], discriminator: nn.Module, perceptual: nn.Module, adaptive: bool) -> Any:
    """TokenizerLoss of the official options."""
    weight = float(config.get("reconstruction_weight", 1.0))
    kind = {"l1": Reconstruction(l1=weight, l2=0.0), "l2": Reconstruction(l2=weight)}[config["reconstruction"]]
    names = {"hinge": "hinge", "vanilla": "vanilla", "non-saturating": "non_saturating"}
    return TokenizerLoss(
        kind,
        perceptual,
        float(config.get("perceptual_weight", 1.0)),
        discriminator,
        float(config["disc_weight"]),
        int(config["disc_start"]),
        names[config["gen_loss"]],  # type: ignore[arg-type]
        names[config["disc_loss"]],  # type: ignore[arg-type]
        adaptive,
    )


def _gan_losses(
    config: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    meanings: Mapping[str, str],
    adaptive: bool,
) -> dict[str, Tensor]:
    """Both sides' losses and gradients before and after the start step; every one from the stored weights.

    In float64: the entropy term's temperature of 0.01 amplifies rounding, so that float32 gradients differ between
    machines and numbers of threads by as much as the tolerance.
    """
    case, images = "loss/adaptive" if adaptive else "loss/plain", inputs["vq/images"].double()
    outputs: dict[str, Tensor] = {}
    for moment in ("before_start", "after_start"):
        step = int(re.search(r"global_step (\d+)", meanings[f"{case}/generator_{moment}"])[1])  # type: ignore[index]
        tokenizer = load_official(tokenizer_from_config(config["vq"], images.shape[-1]), weights["vq"]).train().double()
        discriminator = discriminator_from_official(config["disc"], weights["discriminator"]).train().double()
        perceptual = Given(inputs["vq/train/perceptual"].double())
        loss = loss_from_config(config["loss"], discriminator, perceptual, adaptive)
        output = tokenizer(images)
        total = loss.generator_loss(images, output, step, tokenizer.last_layer).total
        outputs[f"{case}/generator_{moment}"] = total
        if not adaptive:
            outputs |= _gradients(tokenizer, total, case, moment)
            fresh = discriminator_from_official(config["disc"], weights["discriminator"]).train().double()
            loss.discriminator = fresh
            outputs[f"{case}/discriminator_{moment}"] = loss.discriminator_loss(
                images, output.reconstruction, step
            ).total
        elif moment == "after_start":
            outputs |= _adaptive_parts(config, weights, loss, images, output, tokenizer)
    return outputs


def _gradients(tokenizer: LlamaGenVQ, total: Tensor, case: str, moment: str) -> dict[str, Tensor]:
    if moment != "before_start":
        return {}
    total.backward(retain_graph=True)
    parameters = list(tokenizer.parameters())
    codebook = tokenizer.quantizer.codebook.weight  # type: ignore[union-attr]
    return {
        f"{case}/grad_norm_{moment}": nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]),
        f"{case}/grad_quant_conv": tokenizer.quant_conv.weight.grad,  # type: ignore[dict-item]
        f"{case}/grad_codebook": codebook.grad,  # type: ignore[dict-item, union-attr]
    }


def _adaptive_parts(
    config: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    loss: TokenizerLoss,
    images: Tensor,
    output: TokenizerOutput,
    tokenizer: LlamaGenVQ,
) -> dict[str, Tensor]:
    fresh = discriminator_from_official(config["disc"], weights["discriminator"]).train().double()
    adversarial = generator_adversarial(fresh(output.reconstruction), loss.adversarial_kind)
    assert loss.perceptual is not None
    nll = loss.reconstruction.weighted(loss.reconstruction(images, output.reconstruction))
    nll = nll + loss.perceptual_weight * loss.perceptual(images, output.reconstruction).mean()
    return {
        "loss/adaptive/weight": adaptive_weight(nll, adversarial, tokenizer.last_layer),
        "loss/adaptive/gen_adv": adversarial,
    }

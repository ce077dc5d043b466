"""Replays of TokenBridge's generator, channel head and sampler (recordings of system `tokenbridge`)."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from tessellar.errors import UserError
from tessellar.interop.options import require
from tessellar.models.mar.parity import recorded_guidance, recorded_mask, training_options
from tessellar.models.tokenbridge.model import TokenBridge
from tessellar.models.tokenbridge.official import from_official
from tessellar.parity.forms import as_map, as_vectors
from tessellar.parity.generation import with_dropped
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import gradient_norm, steps_of
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import GREEDY
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.tokenbridge import PostQuantized

READ = (
    "img_size vae_stride vae_embed_dim encoder_embed_dim encoder_depth encoder_num_heads decoder_embed_dim "
    "decoder_depth decoder_num_heads mlp_ratio class_num buffer_size channel_embed_dim channel_depth channel_heads "
    "quant_levels quant_min quant_max std_range mask_ratio_min label_drop_prob attn_dropout proj_dropout "
    "grad_checkpointing"
).split()


def _tokenizer(config: Mapping[str, Any]) -> PostQuantized:
    """The recorded grid over a VAE of the recorded sizes, whose weights no replay asks."""
    levels = config["vae_stride"].bit_length()
    vae = KLVAE(
        GaussianBottleneck(config["vae_embed_dim"], scale=1.0),
        config["img_size"],
        channels=8,
        multipliers=(1,) * levels,
        num_res_blocks=1,
        groups=8,
    )
    return PostQuantized(
        vae,
        config["quant_levels"],
        lowest=config["quant_min"],
        highest=config["quant_max"],
        spread=config["std_range"],
    )


def recorded_generator(recording: Recording) -> TokenBridge:
    """Our generator with the recorded weights and options, over the recorded grid."""
    # A token of TokenBridge is one latent.
    config = recording.options("model", READ, {"patch_size": 1})
    tokenizer = _tokenizer(config)
    order = recording.inputs["channel_order"]
    if not torch.equal(order.argsort(), recording.inputs["inv_channel_order"]):
        raise UserError("inv_channel_order is not the inverse of channel_order")
    generator = from_official(
        recording.weights["model"],
        tokenizer.layout,
        num_heads=config["encoder_num_heads"],
        decoder_heads=config["decoder_num_heads"],
        channel_order=tuple(order.tolist()),
        **training_options(config),
    )
    generator.bind(tokenizer)
    return generator


@replays("tokenbridge", "train", gradients=True)
def training(recording: Recording) -> Outputs:
    """Indices, mask, states and logits with the classes; loss and gradient with some dropped."""
    generator = recorded_generator(recording)
    (tokenizer,) = generator.bound
    given = recording.inputs
    condition = recording.classes("labels")
    tokens = tokenizer.from_source(as_vectors(given["latents"]))
    masked, visible = recorded_mask(given["orders"], given["num_masked"])
    latents = generator.latents(tokens)
    with torch.no_grad():
        encoded = generator.backbone.encode(latents, visible, condition)
        z = generator.vectors(tokens, ~masked, condition)
        # In float64: the head makes ten times of what two roundings of z differ by.
        exact = copy.deepcopy(generator).double()
        exact_z = exact.backbone(latents.double(), ~masked, condition)
        logits = exact.head(exact_z[masked], generator.channels.classes(tokens[masked]))
    dropped = with_dropped(condition, generator, given["label_drop"])
    loss = generator.masked_loss(tokens, masked, dropped)
    return {
        "indices": tokens,
        "dequant": latents,
        "mask": masked.float(),
        "encoder_out": encoded,
        "z": z,
        "head_logits": torch.stack(logits, 1).float(),
        "loss": loss.detach()[None],
        "grad_norm": gradient_norm(loss, generator)[None],
    }


@replays("tokenbridge", "greedy")
def greedy(recording: Recording) -> Outputs:
    """The head alone: the likeliest class of one position after the other, behind its cache."""
    head = recorded_generator(recording).head
    z = recording.inputs["greedy/z"]
    known = torch.zeros(1, len(z), len(head.sizes), dtype=torch.int64)
    walk = head.steps(z[None])
    logits = []
    for position in range(len(head.sizes)):
        logits.append(walk(known, position)[0])
        known[0, :, position] = logits[-1].argmax(-1)
    return {
        "greedy/tokens": known[0],
        "greedy/logits": torch.stack(logits, 1),
        "greedy/teacher_forced_logits": torch.stack(head(z, known[0]), 1),
    }


@replays("tokenbridge", "sample_*")
def sampling(recording: Recording) -> Outputs:
    """Tokens and latents of every run, and the guided vectors of each of its steps."""
    generator = recorded_generator(recording)
    condition = recording.classes("labels")
    side = generator.layout.segments[0].shape[0]
    outputs = {}
    for name, settings in recording.each("sample_*/latents"):
        run = name.removesuffix("/latents")
        require(settings, name, {"temperature": 0})  # greedy
        entities = generator.sets(recording.inputs["orders"].flip(1), settings["num_iter"])
        state = generator.start(condition, recorded_guidance(settings), entities)
        for step in steps_of(generator, state, GREEDY, Noise(range(state.batch))):
            hidden = step.distribution.hidden
            assert hidden is not None
            outputs[f"{run}/iter{step.entity}_feature"] = hidden.flatten(0, 1)
            outputs[f"{run}/indices"] = step.tokens
        outputs[name] = as_map(generator.latents(outputs[f"{run}/indices"]), side)
    return outputs

"""Replays of VA-pi: the noisy context, log-probabilities, rewards, advantages, the policy's loss and
its gradient, LPIPS.
"""

from collections.abc import Mapping
from math import isqrt, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.options import require
from tessellar.models.llamagen.model import LlamaGen
from tessellar.models.llamagen.official import from_config
from tessellar.parity.generation import scores_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Fixed, gradient_norm
from tessellar.protocol.distribution import Logits
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.tokenizers.losses.perceptual import LPIPS, VGGFeatures
from tessellar.training.alignment.policy import (
    clipped_surrogate,
    group_advantages,
    k3,
    log_probs_of_groups,
    tempered,
)
from tessellar.training.alignment.rewards import Drawn, ReconstructionReward
from tessellar.training.methods.context_noise import replaced

SYSTEM = "va_pi"
EVAL = {"training": False, "class_dropout_prob": 0.0}


def policy_of(recording: Recording, part: str) -> LlamaGen:
    """The generator of one of the weight files, in eval mode."""
    config = recording.config["gpt"]
    side = isqrt(config["block_size"])
    if side**2 != config["block_size"]:
        raise UserError(f"block_size {config['block_size']} is not a square number of tokens")
    layout = grid_layout(side, side, Categorical(config["vocab_size"]))
    return from_config(recording.weights[part], config, layout).eval()


def context_of(recording: Recording) -> Tensor:
    """Tokens [B, N] as teacher forcing reads them; the last one is never read."""
    tokens = recording.inputs["gt_tokens"]
    mask = recording.inputs["noise/mask"] > 0
    noisy = replaced(tokens[:, :-1], mask, recording.inputs["noise/random_tokens"])
    return torch.cat([noisy, tokens[:, -1:]], dim=1)


def scores(recording: Recording, generator: LlamaGen) -> Logits:
    """Predictions from the noisy context."""
    return scores_of(generator, context_of(recording), recording.classes("labels"))


def samples_of(recording: Recording) -> Tensor:
    """The recorded samples, [B, G, N]."""
    tokens = recording.inputs["gt_tokens"]
    return recording.inputs["sampled_tokens"].view(len(tokens), -1, tokens.shape[1])


def old_log_probs(recording: Recording, temperature: float) -> Tensor:
    """Log-probabilities [R, N] of the samples under the policy that drew them."""
    with torch.no_grad():
        old = tempered(scores(recording, policy_of(recording, "old_policy")), temperature)
    return log_probs_of_groups(old, samples_of(recording))


def rewards_of(recording: Recording, kind: str) -> tuple[Tensor, Tensor]:
    """Pixel errors and rewards [R], of the recorded perceptual distances."""
    inputs = recording.inputs
    config = recording.config
    reward = ReconstructionReward(
        pixels=config["reward_rec_weight"],
        kind=kind,  # type: ignore[arg-type]
        perceptual=Fixed(inputs["perceptual"]),
        perceptual_weight=config["reward_perceptual_weight"],
    )
    samples = inputs["recon"]
    group = len(samples) // len(inputs["images"])
    originals = inputs["images"].repeat_interleave(group, 0)
    drawn = Drawn(images=samples, originals=originals, batch={})
    return reward.pixel_error(drawn), reward(drawn)


@replays(SYSTEM, "shared", "policy")
def policy(recording: Recording) -> Outputs:
    """Context, logits of both policies, and what the samples had as log-probabilities."""
    require(recording.case_settings.get("policy", {}), "the recorded policy", EVAL)
    temperature = recording.settings("old_logprobs")["temperature"]
    return {
        "noise/context": context_of(recording)[:, :-1],
        "old/logits": scores(recording, policy_of(recording, "old_policy")).logits,
        "policy/logits": scores(recording, policy_of(recording, "policy")).logits,
        "old_logprobs": old_log_probs(recording, temperature),
    }


@replays(SYSTEM, "reward")
def reward(recording: Recording) -> Outputs:
    """Errors and rewards by the recorded kinds of pixel error."""
    outputs = {}
    for name, settings in recording.each("reward/*"):
        error, value = rewards_of(recording, settings["reward_rec_type"])
        outputs[name] = value if name.endswith("/reward") else error
    return outputs


def _advantages(rewards: Tensor, group: int, settings: Mapping[str, Any]) -> Tensor:
    require(settings, "the recorded advantages", {"unbiased": True})
    return group_advantages(rewards, group, eps=settings["eps"])


@replays(SYSTEM, "advantages")
def advantages(recording: Recording) -> Outputs:
    """Of the recorded rewards by squared error."""
    _, rewards = rewards_of(recording, "l2")
    settings = recording.settings("advantages")
    return {"advantages": _advantages(rewards, recording.config["group_size"], settings)}


@replays(SYSTEM, "advantages_degenerate")
def degenerate(recording: Recording) -> Outputs:
    """Of rewards with a group of equal ones."""
    rewards = recording.inputs["advantages_degenerate/rewards"]
    name = "advantages_degenerate/advantages"
    settings = recording.settings(name)
    return {name: _advantages(rewards, recording.config["group_size"], settings)}


@replays(SYSTEM, "loss_*", gradients=True)
def losses(recording: Recording) -> Outputs:
    """The clipped loss of every recorded setting, its parts and its gradient."""
    outputs: Outputs = {}
    for name in recording.outputs("loss/*/total"):
        made = _loss(recording, recording.settings(name))
        run = name.rpartition("/")[0]
        recorded = recording.outputs(f"{run}/*")
        for part, value in made.items():
            if f"{run}/{part}" in recorded:
                outputs[f"{run}/{part}"] = value
    return outputs


def _loss(recording: Recording, settings: Mapping[str, Any]) -> Outputs:
    require(settings, "the recorded loss", EVAL)
    group = recording.config["group_size"]
    with torch.no_grad():
        _, rewards = rewards_of(recording, "l2")
        advantages = group_advantages(rewards, group)
        bound = settings["adv_clip_max"]
        advantages = advantages.clamp(-bound, bound)
    generator = policy_of(recording, "policy")
    predicted = scores(recording, generator)
    temperature = settings["temperature"]
    samples = samples_of(recording)
    new = log_probs_of_groups(tempered(predicted, temperature), samples)
    surrogate = clipped_surrogate(
        new, old_log_probs(recording, 1.0), advantages, settings["clip_range"]
    )
    policy = surrogate.loss
    made = {"ratio": surrogate.ratio}
    if settings["use_kl_loss"]:
        with torch.no_grad():
            frozen = tempered(scores(recording, policy_of(recording, "reference")), temperature)
            reference = log_probs_of_groups(frozen, samples)
        made["kl"] = k3(reference, new)
        policy = policy + settings["kl_coef"] * made["kl"]
    cross_entropy = predicted.cross_entropy(recording.inputs["gt_tokens"])
    total = policy.mean() + settings["aux_ce_weight"] * cross_entropy
    norm = gradient_norm(total, generator)
    return {**made, "policy": policy, "ce": cross_entropy, "total": total, "grad_norm": norm}


def random_vgg(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The recorded VGG-16's weights, which are drawn: torchvision's keys."""
    known = {
        "vgg_weight_std": "sqrt(2/(in*9))",
        "vgg_rng": "numpy.random.default_rng",
        "vgg_dtype": "float32",
        "training": False,
    }
    require(settings, "the recorded LPIPS", known)
    draws = np.random.default_rng(settings["vgg_seed"])
    state = {}
    with torch.device("meta"):
        shapes = VGGFeatures().state_dict()
    for name, tensor in shapes.items():
        drawn = draws.standard_normal(tuple(tensor.shape))
        if name.endswith("weight"):
            inputs = prod(tensor.shape[1:])
            drawn = drawn * np.sqrt(2 / inputs)
        else:
            drawn = drawn * settings["vgg_bias_std"]
        state[name] = torch.from_numpy(drawn.astype(np.float32))
    return state


@replays(SYSTEM, "lpips")
def lpips(recording: Recording) -> Outputs:
    """LPIPS of drawn VGG weights and recorded heads."""
    settings = recording.settings("lpips/value")
    with TemporaryDirectory() as folder:
        vgg = Path(folder) / "vgg.safetensors"
        save_file(random_vgg(settings), vgg)
        heads = Path(folder) / "heads.safetensors"
        save_file(recording.weights["lpips_lin"], heads)
        distance = LPIPS(str(vgg), str(heads))
    return {"lpips/value": distance(recording.inputs["lpips/a"], recording.inputs["lpips/b"])}

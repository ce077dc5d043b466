"""Replay of the official MaskGIT generators (recordings of system `titok_maskgit`): logits, loss, decoded tokens.

Decoding consumes the recorded uniform noise in the official order: tokens, then confidences, once a step.
"""

import torch
from torch import Tensor

from tessellar.models.maskgit.model import MaskGIT
from tessellar.models.maskgit.official import from_official
from tessellar.parity.recording import Recording
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant, Guidance, Linear, PowerCosine
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.confidence import decode_by_confidence


class RecordedNoise(Noise):
    """Uniform draws [B, ...] as they were recorded, one after the other."""

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__([])
        self.draws = iter(draws)

    def uniform(self, *shape: int) -> Tensor:
        return next(self.draws)


@torch.no_grad()
def vit(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the BERT backbone."""
    return _outputs(recording, "vit")


@torch.no_grad()
def uvit(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the U-ViT backbone."""
    return _outputs(recording, "uvit")


def _outputs(recording: Recording, part: str) -> dict[str, Tensor]:
    config = recording.config
    layout = sequence_layout(config["image_seq_len"], Categorical(config["codebook_size"]))
    generator = from_official(recording.weights[part], layout, config["num_attention_heads"])
    outputs = _scores(recording, part, generator) if f"gen_{part}_train" in recording.cases else {}
    for name in recording.names("output", recording.cases):
        if name.startswith(f"{part}/gen_"):
            outputs[name] = _decoded(recording, name.removesuffix("/ids"), generator)
    return outputs


def _scores(recording: Recording, part: str, generator: MaskGIT) -> dict[str, Tensor]:
    tokens, masked = recording.inputs["tokens"], recording.inputs["mask"] > 0
    hidden = recording.inputs["masked_tokens"]
    assert torch.equal(hidden, torch.where(masked, generator.vocab, tokens)), "masked_tokens are not the masked tokens"
    condition = Condition(ids=recording.inputs["class_ids"])
    logits = generator.logits(hidden, masked, condition)
    right = (logits.argmax(-1) == tokens)[masked]
    return {
        f"{part}/logits_cond": logits,
        f"{part}/logits_uncond": generator.logits(hidden, masked, generator.null(condition)),
        f"{part}/mlm_loss": generator.masked_loss(tokens, masked, condition),
        f"{part}/mlm_acc": right.float().mean(),
    }


def _decoded(recording: Recording, run: str, generator: MaskGIT) -> Tensor:
    kind = run.partition("/gen_")[2]
    settings, inputs = recording.config["generation"][kind], recording.inputs
    draws = zip(inputs[f"{run}/u_tokens"], inputs[f"{run}/u_conf"], strict=True)
    return decode_by_confidence(
        generator,
        Condition(ids=inputs["class_ids"]),
        RecordedNoise([draw for pair in draws for draw in pair]),
        _guidance(kind, settings["guidance_scale"], settings["guidance_scale_pow"]),
        settings["steps"],
        settings["randomize_temperature"],
        settings["softmax_temperature_annealing"],
    )


def _guidance(kind: str, scale: float, power: float) -> Guidance:
    """Theirs is c + w (c - u) for `constant` and `linear`, so their w is ours less 1."""
    if kind == "power-cosine":
        return Guidance(PowerCosine(scale, power, reach_end=False))
    return Guidance(Constant(scale + 1) if kind == "constant" else Linear(scale + 1, 1.0, reach_end=False))

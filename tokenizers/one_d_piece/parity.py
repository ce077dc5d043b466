"""Replay of what the official One-D-Piece gave (recordings of `one_d_piece`); images there are in [0, 1].

The lengths of the decoded prefixes stand in the outputs' names, or in their meanings as `length=n`.
"""

import re

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.parity.recording import Recording, numbers
from tessellar.tokenizers.one_d_piece.tokenizer import OneDPiece
from tessellar.tokenizers.titok.parity import as_map, from_unit, make, to_unit
from tessellar.tokenizers.titok.tokenizer import Stage


def _tokenizer(recording: Recording, stage: Stage = "decoder") -> OneDPiece:
    return make(recording, recording.config["vq_model"], "model", stage, OneDPiece)


class Given(nn.Module):
    """Recorded codes in place of a VQGAN."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes = codes

    def forward(self, _: Tensor) -> Tensor:
        return self.codes


@torch.no_grad()
def evaluate(recording: Recording) -> dict[str, Tensor]:
    """Tokens, and scores and images of their prefixes."""
    tokenizer, images = _tokenizer(recording), from_unit(recording.inputs["images"])
    latents, tokens, outputs = tokenizer.latents(images), tokenizer.encode(images), {}
    for name in recording.names("output", {"decode"}):
        told = re.search(r"_len(\d+)$", name)
        length = int(told[1]) if told else _length(recording, name)
        if name.startswith("logits"):
            scores = tokenizer.scores(tokenizer.quantizer.decode(tokens[:, :length]))
            outputs[name] = rearrange(scores, "b h w v -> b v h w")
        else:
            outputs[name] = to_unit(tokenizer.decode(tokens[:, :length]))
    return {
        "latents": as_map(latents),
        "tokens": rearrange(tokens, "b n -> b 1 n"),
        "z_quantized": as_map(tokenizer.quantizer(latents).quantized),
        **outputs,
    }


def _length(recording: Recording, name: str) -> int:
    """From the meaning, or from that of `decode_tokens` where it says "same"."""
    for meaning in (recording.meanings[name], recording.meanings.get("decode_tokens", "")):
        if "length" in (found := numbers(meaning)):
            return int(found["length"])
    return int(recording.config["vq_model"]["num_latent_tokens"])


@torch.no_grad()
def train(recording: Recording) -> dict[str, Tensor]:
    """A training pass of the first stage that keeps the recorded number of tokens."""
    tokenizer, images = _tokenizer(recording, "proxy").train(), from_unit(recording.inputs["images"])
    length = int(recording.inputs["train/keep_length"])
    tokenizer.draw_length = lambda: length
    tokenizer.target = Given(recording.inputs["train/proxy_codes"])  # type: ignore[assignment]
    losses = tokenizer(images).losses
    vectors = tokenizer.quantizer(tokenizer.latents(images)).quantized[:, :length]
    return {
        "train/logits": rearrange(tokenizer.scores(vectors), "b h w v -> b v h w"),
        "train/ce": losses["proxy"],
        "train/quantizer_loss": losses["codebook"] + losses["commitment"],
        "train/total": sum(losses.values(), torch.zeros(())),
    }

"""Replays of One-D-Piece (recordings of system `one_d_piece`, whose images are in [0, 1])."""

from einops import rearrange

from tessellar.parity.forms import as_row, from_unit, to_unit
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Fixed
from tessellar.tokenizers.one_d_piece.tokenizer import OneDPiece
from tessellar.tokenizers.titok.parity import recorded_tokenizer
from tessellar.tokenizers.titok.tokenizer import Stage


def _tokenizer(recording: Recording, stage: Stage = "decoder") -> OneDPiece:
    return recorded_tokenizer(recording, "vq_model", "model", OneDPiece, stage)


@replays("one_d_piece", "shared", "encode", "decode")
def evaluate(recording: Recording) -> Outputs:
    """Tokens, and scores and images of their prefixes."""
    tokenizer = _tokenizer(recording)
    images = from_unit(recording.inputs["images"])
    latents = tokenizer.latents(images)
    tokens = tokenizer.encode(images)
    outputs = {
        "latents": as_row(latents),
        "tokens": tokens[:, None],
        "z_quantized": as_row(tokenizer.quantizer(latents).quantized),
    }
    for name in recording.names("output", {"decode"}):
        prefix = tokens[:, : recording.settings(name)["length"]]
        if name.startswith("logits"):
            scores = tokenizer.scores(tokenizer.quantizer.decode(prefix))
            outputs[name] = rearrange(scores, "b h w v -> b v h w")
        else:
            outputs[name] = to_unit(tokenizer.decode(prefix))
    return outputs


@replays("one_d_piece", "shared", "train")
def train(recording: Recording) -> Outputs:
    """A training pass of the first stage that keeps the recorded number of tokens."""
    tokenizer = _tokenizer(recording, "proxy").train()
    images = from_unit(recording.inputs["images"])
    length = int(recording.inputs["train/keep_length"])
    tokenizer.draw_length = lambda: length
    tokenizer.target = Fixed(recording.inputs["train/proxy_codes"])  # type: ignore[assignment]
    losses = tokenizer(images).losses
    quantizer_loss = losses["codebook"] + losses["commitment"]
    vectors = tokenizer.quantizer(tokenizer.latents(images)).quantized[:, :length]
    return {
        "train/logits": rearrange(tokenizer.scores(vectors), "b h w v -> b v h w"),
        "train/ce": losses["proxy"],
        "train/quantizer_loss": quantizer_loss,
        "train/total": losses["proxy"]
        + recording.settings("train/total")["quantizer_weight"] * quantizer_loss,
    }

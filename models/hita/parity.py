"""Replays of Hita's generator (cases `gen_*` of recordings of system `hita`)."""

from math import isqrt

import torch
from torch import Tensor

from tessellar.interop.options import check_options
from tessellar.models.hita.model import HitaAR, Lookup
from tessellar.models.hita.official import from_official
from tessellar.models.llamagen.parity import guidance_of
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Calls, greedy, logits_of
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.tokenizers.hita.parity import recorded_tokenizer

READ = (
    "dim n_layer n_head multiple_of norm_eps rope_base vocab_size block_size num_slots num_classes class_dropout_prob "
    "all_dropouts"
).split()


def _generator(recording: Recording, lookup: Lookup = "official") -> HitaAR:
    config = recording.config["generator"]
    check_options(config, "the config's generator", READ, {"cls_token_num": 1})
    state = recording.weights["generator"]
    side = isqrt(config["block_size"])
    holistic = Categorical(state["slot_embeddings.weight"].shape[0])
    patches = Categorical(state["tok_embeddings.weight"].shape[0])
    layout = Layout(
        (
            Segment((config["num_slots"],), holistic, "holistic"),
            Segment((side, side), patches, "patches"),
        ),
    )
    return from_official(
        state,
        layout,
        num_heads=config["n_head"],
        lookup=lookup,
        norm_eps=config["norm_eps"],
        rope_base=config["rope_base"],
        condition_dropout=config["class_dropout_prob"],
        dropout=config["all_dropouts"],
    )


def _condition(recording: Recording) -> Condition:
    return Condition(ids=recording.inputs["ar_cond"])


def _tokens(recording: Recording) -> Tensor:
    return recorded_tokenizer(recording).encode(recording.inputs["image"])


@replays("hita", "gen_train")
def scores(recording: Recording) -> dict[str, Tensor]:
    """Logits of both heads at every place, and the loss of each segment."""
    generator = _generator(recording)
    tokens = _tokens(recording)
    # The recording has the logits of both heads at every place; ours computes one of them each.
    calls = Calls(generator.norm)
    losses = generator.loss(tokens, _condition(recording))
    hidden = calls.outputs[0]
    return {
        "ar_train_logits": torch.cat(
            [generator.holistic_output(hidden), generator.patch_output(hidden)], -1
        ),
        "ar_loss_slots": losses["holistic"],
        "ar_loss_patches": losses["patches"],
    }


@replays("hita", "gen_incremental")
def incremental(recording: Recording) -> dict[str, Tensor]:
    """Logits of each token, decoded behind the ones that are given."""
    generator = _generator(recording, recording.settings("ar_incremental_logits")["lookup"])
    tokens = _tokens(recording)
    steps = []
    # Token n from a fresh cache each time: n + 1 inputs at once, of which the last counts.
    for count in range(1, generator.entities.count + 1):
        state = generator.start(_condition(recording))
        steps.append(logits_of(generator.predict(state, tokens, count, want=1)))
    return {"ar_incremental_logits": torch.cat(steps, 1)}


@replays("hita", "gen_greedy_*")
def decoding(recording: Recording) -> dict[str, Tensor]:
    """Greedy tokens of every run, and the images of those that have one."""
    images = recording.outputs("ar_greedy_*_image")
    outputs = {}
    for name in recording.outputs("ar_greedy_*"):
        if name not in images:
            settings = recording.settings(name)
            generator = _generator(recording, settings["lookup"])
            outputs[name] = greedy(generator, _condition(recording), guidance_of(settings)).tokens
    for name in images:
        outputs[name] = recorded_tokenizer(recording).decode(outputs[name.removesuffix("_image")])
    return outputs


@replays("hita", "gen_inpaint")
def inpainting(recording: Recording) -> dict[str, Tensor]:
    """Greedy tokens behind given ones."""
    settings = recording.settings("ar_inpaint_greedy")
    generator = _generator(recording, settings["lookup"])
    given = settings["num_forced_slots"] + settings["num_forced_patches"]
    decoded = greedy(
        generator, _condition(recording), guidance_of(settings), _tokens(recording), first=given
    )
    return {"ar_inpaint_greedy": decoded.tokens}

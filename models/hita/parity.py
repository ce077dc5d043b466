"""Replays of Hita's generator (cases `gen_*` of recordings of system `hita`)."""

from math import isqrt

import torch
from torch import Tensor

from tessellar.models.hita.model import HitaAR, Lookup
from tessellar.models.hita.official import from_official
from tessellar.models.llamagen.parity import guidance_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Calls, greedy, logits_of
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.tokenizers.hita.parity import recorded_tokenizer

READ = (
    "dim n_layer n_head multiple_of norm_eps rope_base vocab_size block_size num_slots num_classes class_dropout_prob "
    "all_dropouts"
).split()


def _generator(recording: Recording, lookup: Lookup = "official") -> HitaAR:
    config = recording.options("generator", READ, {"cls_token_num": 1})
    state = recording.weights["generator"]
    side = isqrt(config["block_size"])
    slots = Categorical(len(state["slot_embeddings.weight"]))
    patches = Categorical(len(state["tok_embeddings.weight"]))
    holistic = Segment((config["num_slots"],), slots, "holistic")
    return from_official(
        state,
        Layout((holistic, Segment((side, side), patches, "patches"))),
        num_heads=config["n_head"],
        lookup=lookup,
        norm_eps=config["norm_eps"],
        rope_base=config["rope_base"],
        condition_dropout=config["class_dropout_prob"],
        dropout=config["all_dropouts"],
    )


def _tokens(recording: Recording) -> Tensor:
    return recorded_tokenizer(recording).encode(recording.inputs["image"])


@replays("hita", "gen_train")
def scores(recording: Recording) -> Outputs:
    """Logits of both heads at every place, and the loss of each segment."""
    generator = _generator(recording)
    # The recording has the logits of both heads at every place; ours computes one of them each.
    calls = Calls(generator.norm)
    losses = generator.loss(_tokens(recording), recording.classes("ar_cond"))
    hidden = calls.outputs[0]
    both = [generator.holistic_output(hidden), generator.patch_output(hidden)]
    return {
        "ar_train_logits": torch.cat(both, -1),
        "ar_loss_slots": losses["holistic"],
        "ar_loss_patches": losses["patches"],
    }


@replays("hita", "gen_incremental")
def incremental(recording: Recording) -> Outputs:
    """Logits of each token, decoded behind the ones that are given."""
    generator = _generator(recording, recording.settings("ar_incremental_logits")["lookup"])
    tokens = _tokens(recording)
    steps = []
    # Token n from a fresh cache each time: n + 1 inputs at once, of which the last counts.
    for count in range(1, generator.entities.count + 1):
        state = generator.start(recording.classes("ar_cond"))
        steps.append(logits_of(generator.predict(state, tokens, count, want=1)))
    return {"ar_incremental_logits": torch.cat(steps, 1)}


@replays("hita", "gen_greedy_*")
def decoding(recording: Recording) -> Outputs:
    """Greedy tokens of every run, and the images of those that have one."""
    images = recording.outputs("ar_greedy_*_image")
    outputs = {}
    for name, settings in recording.each("ar_greedy_*"):
        if name not in images:
            generator = _generator(recording, settings["lookup"])
            decoded = greedy(generator, recording.classes("ar_cond"), guidance_of(settings))
            outputs[name] = decoded.tokens
    for name in images:
        outputs[name] = recorded_tokenizer(recording).decode(outputs[name.removesuffix("_image")])
    return outputs


@replays("hita", "gen_inpaint")
def inpainting(recording: Recording) -> Outputs:
    """Greedy tokens behind given ones."""
    settings = recording.settings("ar_inpaint_greedy")
    generator = _generator(recording, settings["lookup"])
    given = settings["num_forced_slots"] + settings["num_forced_patches"]
    condition = recording.classes("ar_cond")
    tokens = _tokens(recording)
    decoded = greedy(generator, condition, guidance_of(settings), tokens, first=given)
    return {"ar_inpaint_greedy": decoded.tokens}

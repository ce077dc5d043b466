"""Replays of IBQ's generator (recordings of system `seed_voken`): scores, loss, guided greedy
decoding.
"""

from math import isqrt

from tessellar.errors import UserError
from tessellar.models.ibq.model import IBQAR
from tessellar.models.ibq.official import from_official
from tessellar.parity.generation import scores_of
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, grid_layout

# `alng` is how small gates start.
READ = "vocab_size block_size n_head n_layer n_embd cond_dim class_num multiple_of alng".split()


def _generator(recording: Recording) -> IBQAR:
    config = recording.options("llama", READ)
    side = isqrt(config["block_size"])
    layout = grid_layout(side, side, Categorical(config["vocab_size"]))
    return from_official(recording.state("ibq_ar."), layout, config["n_head"])


@replays("seed_voken", "ibq_ar")
def scores(recording: Recording) -> Outputs:
    """Logits of given tokens, and their loss."""
    tokens = recording.inputs["ibq_ar.idx"]
    scored = scores_of(_generator(recording), tokens, recording.classes("gpt.labels"))
    return {"ibq_ar.logits": scored.logits, "ibq_ar.loss": scored.cross_entropy(tokens)[None]}


@replays("seed_voken", "ibq_ar_greedy")
def greedy_tokens(recording: Recording) -> Outputs:
    """Greedy tokens behind the cache, and the guided logits of each step."""
    settings = recording.settings("ibq_ar.greedy")
    if settings["top_k"] != 1 and not settings["greedy"]:
        raise UserError("IBQ's sampler is replayed greedily: top_k 1")
    guidance = Guidance(Constant(settings["cfg_scale"]))
    decoded = greedy(_generator(recording), recording.classes("gpt.labels"), guidance)
    return {
        "ibq_ar.greedy": decoded.tokens,
        "ibq_ar.greedy_logits": decoded.logits / settings["temperature"],
    }

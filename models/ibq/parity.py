"""Replays of IBQ's generator (recordings of system `seed_voken`): scores, loss, guided greedy
decoding.
"""

from math import isqrt

from torch import Tensor

from tessellar.checkpoints.weights import part_of
from tessellar.errors import UserError
from tessellar.interop.options import check_options
from tessellar.models.ibq.model import IBQAR
from tessellar.models.ibq.official import from_official
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, grid_layout

# `alng` is how small gates start.
READ = "vocab_size block_size n_head n_layer n_embd cond_dim class_num multiple_of alng".split()


def _generator(recording: Recording) -> IBQAR:
    config = recording.config["llama"]
    check_options(config, "the config's llama", READ)
    side = isqrt(config["block_size"])
    layout = grid_layout(side, side, Categorical(config["vocab_size"]))
    weights = part_of(recording.weights["model"], "ibq_ar.")
    return from_official(weights, layout, config["n_head"])


def _classes(recording: Recording) -> Condition:
    return Condition(ids=recording.inputs["gpt.labels"])


@replays("seed_voken", "ibq_ar")
def scores(recording: Recording) -> dict[str, Tensor]:
    """Logits of given tokens, and their loss."""
    tokens = recording.inputs["ibq_ar.idx"]
    scored = _generator(recording).score(tokens, _classes(recording))
    assert isinstance(scored, Logits)
    return {"ibq_ar.logits": scored.logits, "ibq_ar.loss": scored.cross_entropy(tokens)[None]}


@replays("seed_voken", "ibq_ar_greedy")
def greedy_tokens(recording: Recording) -> dict[str, Tensor]:
    """Greedy tokens behind the cache, and the guided logits of each step."""
    settings = recording.settings("ibq_ar.greedy")
    if settings["top_k"] != 1 and not settings["greedy"]:
        raise UserError("IBQ's sampler is replayed greedily: top_k 1")
    guidance = Guidance(Constant(settings["cfg_scale"]))
    decoded = greedy(_generator(recording), _classes(recording), guidance)
    return {
        "ibq_ar.greedy": decoded.tokens,
        "ibq_ar.greedy_logits": decoded.logits / settings["temperature"],
    }

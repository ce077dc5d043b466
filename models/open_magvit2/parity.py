"""Replays of Open-MAGVIT2's generator (recordings of system `seed_voken`): scores, losses, guided
greedy decoding.
"""

from math import isqrt

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.open_magvit2.model import OpenMAGVIT2AR
from tessellar.models.open_magvit2.official import from_official
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.protocol.distribution import Distribution, FactorLogits
from tessellar.protocol.guidance import Guidance, PerSubToken
from tessellar.protocol.layout import Factorized, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.sampling.settings import GREEDY

READ = "block_size factorized_bits n_head".split()
# What shapes tell, what only training needs, and what is said twice: the vocabulary is of no use here.
SHOWN = "spatial_n_layer factorized_n_layer dim cond_dim class_num multiple_of vocab_size".split()
TRAINING = "token_drop resid_dropout_p".split()


def _generator(recording: Recording) -> OpenMAGVIT2AR:
    known = (*READ, *SHOWN, *TRAINING)
    config = recording.options("gpt", known, {"token_factorization": True})
    side = isqrt(config["block_size"])
    vocabs = tuple(2**bits for bits in config["factorized_bits"])
    layout = grid_layout(side, side, Factorized(vocabs))
    return from_official(recording.state("gpt."), layout, config["n_head"])


def _logits(distribution: Distribution, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of both sub-tokens, the second given the first."""
    assert isinstance(distribution, FactorLogits) and distribution.together is not None
    first, second = distribution.together(tokens)
    return first, second


@replays("seed_voken", "gpt")
def scores(recording: Recording) -> Outputs:
    """Logits of both sub-tokens of given tokens, and the loss of each."""
    generator = _generator(recording)
    tokens = torch.stack([recording.inputs["gpt.idx_pre"], recording.inputs["gpt.idx_post"]], -1)
    scored = generator.score(tokens, recording.classes("gpt.labels"))
    outputs = {}
    for name, logits, ids in zip(
        ("pre", "post"), _logits(scored, tokens), tokens.unbind(-1), strict=True
    ):
        outputs[f"gpt.logits_{name}"] = logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        outputs[f"gpt.loss_{name}"] = loss[None]
    return outputs


@replays("seed_voken", "gpt_greedy")
def greedy(recording: Recording) -> Outputs:
    """Greedy tokens behind both caches, and the guided logits of both sub-tokens at each step."""
    generator = _generator(recording)
    settings = recording.settings("gpt.greedy_pre")
    if settings["top_k"] != 1 and not settings["greedy"]:
        raise UserError("Open-MAGVIT2's sampler is replayed greedily: top_k 1")
    first, second = settings["cfg_scale"]
    guidance = Guidance(PerSubToken(first, further=(second,)))
    condition = recording.classes("gpt.labels")
    state = generator.start(condition, guidance)
    tokens = generator.layout.blank(condition.batch)
    steps = []
    for step in decode_from(generator, state, GREEDY, Noise([0] * condition.batch), tokens):
        tokens = step.tokens
        steps.append(_logits(step.distribution, tokens[:, step.entity, None]))
    outputs = {}
    for place, name in enumerate(("pre", "post")):
        outputs[f"gpt.greedy_{name}"] = tokens[..., place]
        logits = torch.cat([both[place] for both in steps], 1)
        outputs[f"gpt.greedy_logits_{name}"] = logits / settings["temperature"]
    return outputs

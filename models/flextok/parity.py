"""Replay of what the official FlexAR generators gave (recordings of system `flextok_ar`).

Sizes are read from the recording's config and weights; classes, prefixes and candidates from the meanings of outputs.
"""

import re

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.flextok.model import FlexAR
from tessellar.models.flextok.official import generator_from_official
from tessellar.parity.recording import Recording
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.generator import State
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from

GREEDY = Choice(temperature=0)


def _generator(recording: Recording, part: str) -> FlexAR:
    config = recording.config
    state = {k.removeprefix(f"{part}/"): t for k, t in recording.weights["model"].items() if k.startswith(f"{part}/")}
    layout = sequence_layout(config["num_tokens"], Categorical(config["codebook_size"]), min_prefix=1)
    generator = generator_from_official(state, layout, config["num_heads"], config["text_length"])
    made = (generator.positions.shape[1], len(generator.layers))
    if made != (config["embed_dim"], config["depth"]):
        raise UserError(f"the weights have width and depth {made}, not the config's {config}")
    return generator


def _classes(generator: FlexAR, ids: Tensor) -> Condition:
    """Official -1 is no class."""
    assert generator.num_classes is not None
    return Condition(ids=torch.where(ids < 0, generator.num_classes, ids))


def _score(generator: FlexAR, tokens: Tensor, condition: Condition) -> Logits:
    scores = generator.score(tokens, condition)
    assert isinstance(scores, Logits)
    return scores


def _greedy(generator: FlexAR, state: State, tokens: Tensor, first: int = 0, last: int | None = None) -> list[Logits]:
    """Most likely tokens from entity `first` on, written into `tokens`; their distributions."""
    found = []
    for step in decode_from(generator, state, GREEDY, Noise(range(len(tokens))), tokens.clone(), first, last):
        tokens.copy_(step.tokens)
        assert isinstance(step.distribution, Logits)
        found.append(step.distribution)
    return found


@torch.no_grad()
def c2i(recording: Recording) -> dict[str, Tensor]:
    """Embeddings, logits, loss, greedy tokens with and without guidance, and branches of the last token."""
    generator, tokens = _generator(recording, "c2i"), recording.inputs["c2i/tokens"]
    condition = _classes(generator, recording.inputs["c2i/class"])
    scores, length = _score(generator, tokens, condition), generator.layout.length
    behind = generator.embed(tokens, torch.arange(length - 1)[None], generator.entities)
    shown = recording.entries["c2i/gen_logits_prefix5"].shape[1]
    prefix = generator.predict(generator.start(condition), tokens, shown)
    assert isinstance(prefix, Logits)
    return {
        "c2i/train_embeddings": torch.cat([generator.prefix(condition).embeddings, behind], dim=1),
        "c2i/train_logits": scores.logits,
        "c2i/ce": scores.cross_entropy(tokens),
        "c2i/gen_logits_prefix5": prefix.logits,
        **_c2i_greedy(recording, generator, tokens),
    }


def _c2i_greedy(recording: Recording, generator: FlexAR, tokens: Tensor) -> dict[str, Tensor]:
    told = re.search(r"classes \[([\d,\s]+)\]", recording.meanings["c2i/greedy_nocfg"])
    labels = [int(label) for label in told[1].split(",")] if told else [1, 2]
    condition = Condition(ids=torch.tensor(labels))
    guidance = Guidance(Constant(float(recording.config["cfg_factor"])))
    blank = generator.layout.blank(len(labels))
    plain, fixed, official = blank.clone(), blank.clone(), blank.clone()
    _greedy(generator, generator.start(condition), plain)
    _greedy(generator, generator.start(condition, guidance), fixed)
    # the official null is no class at the first token and class 0 from the second on, which recomputes the prefix
    _greedy(generator, generator.start(condition, guidance), official, last=1)
    generator.null_class = 0
    _greedy(generator, generator.start(condition, guidance), official, first=1)
    generator.null_class = None
    branch = _branches(recording, generator, condition, tokens[: len(labels)])
    return {"c2i/greedy_nocfg": plain, "c2i/greedy_cfg_fixed": fixed, "c2i/greedy_cfg_official": official, **branch}


def _branches(recording: Recording, generator: FlexAR, condition: Condition, given: Tensor) -> dict[str, Tensor]:
    """Continuations of a prefix, greedy but for the last token, which takes its most likely values."""
    told = re.search(r"prefix (\d+), (\d+) new tokens, (\d+) candidates", recording.meanings["c2i/branch_tokens"])
    if told is None:
        raise UserError("the meaning of c2i/branch_tokens names no prefix, new tokens and candidates")
    prefix, new, candidates = map(int, told.groups())
    tokens = given.clone()
    steps = _greedy(generator, generator.start(condition), tokens, prefix, prefix + new)
    likely = [step.logits[:, -1].log_softmax(-1) for step in steps]
    before = sum((step.max(-1).values for step in likely[:-1]), torch.zeros(len(given)))
    last = likely[-1].topk(candidates)
    rows = tokens[:, : prefix + new].repeat_interleave(candidates, 0)
    rows[:, -1] = last.indices.flatten()
    return {"c2i/branch_tokens": rows, "c2i/branch_logp": (before[:, None] + last.values).flatten()[:, None]}


@torch.no_grad()
def t2i(recording: Recording) -> dict[str, Tensor]:
    """Projected text, logits, and greedy tokens guided against the empty prompt, which is the last one."""
    generator, inputs = _generator(recording, "t2i"), recording.inputs
    features, valid, tokens = inputs["t2i/text_hidden"], inputs["t2i/text_mask"] > 0, inputs["t2i/tokens"]
    generator.set_empty_prompt(features[-1], valid[-1])
    rows = recording.entries["t2i/greedy_cfg"].shape[0]
    drawn = generator.layout.blank(rows)
    guidance = Guidance(Constant(float(recording.config["cfg_factor"])))
    _greedy(generator, generator.start(Condition(valid=valid[:rows], features=features[:rows]), guidance), drawn)
    return {
        "t2i/text_projected": generator.project_text(features),
        "t2i/train_logits": _score(generator, tokens, Condition(valid=valid, features=features)).logits,
        "t2i/greedy_cfg": drawn,
    }

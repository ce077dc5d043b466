"""Lightning checkpoints of the taming family (SEED-Voken, WeTok, UniWeTok): one state dict holds the
model, its loss's networks and an average whose names have lost their dots.

    encoder.conv_in.weight   loss.discriminator...   model_ema.encoderconv_inweight

A generator's holds its tokenizer as well, under `first_stage_model.`.
"""

from collections.abc import Mapping

from torch import Tensor

from tessellar.checkpoints.weights import part_of
from tessellar.errors import UserError
from tessellar.tensor_files import Weights, listing

AVERAGE = "model_ema."
TOKENIZER = "first_stage_model."
GENERATOR = "transformer."
COUNTERS = ("decay", "num_updates")


def tokenizer_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer of such a state dict: its average where there is one, without the networks of its
    loss. Of a generator's checkpoint the tokenizer that it samples with.
    """
    if any(name.startswith(TOKENIZER) for name in state):
        state = part_of(state, TOKENIZER)
    own = {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}
    return Weights(averaged(own), "the tokenizer of this checkpoint")


def generator_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generator of such a state dict; one that holds nothing else has no prefix."""
    if any(name.startswith(GENERATOR) for name in state):
        state = part_of(state, GENERATOR)
    return Weights(state, "the generator of this checkpoint")


def averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with their averages in their places; as they are where there is none.

    Raises UserError where a weight has no average, or two names become one without their dots.
    """
    average = part_of(state, AVERAGE)
    raw = {name: tensor for name, tensor in state.items() if not name.startswith(AVERAGE)}
    if not average:
        return raw
    names = {name.replace(".", ""): name for name in raw}
    if len(names) < len(raw):
        raise UserError("two weights have the same name without dots: their averages are not told")
    absent = [name for dotless, name in names.items() if dotless not in average]
    if absent:
        raise UserError(
            f"this checkpoint averages other weights than it has; {listing('no average of', absent)}"
        )
    return {name: average[dotless] for dotless, name in names.items()}

"""Embedding recovery: hidden states also say which code vectors were read and are to come (reAR,
arXiv 2510.04450).

A generator of indices does not know which codes the tokenizer decodes alike. Two small networks map
hidden states to the tokenizer's code vectors: of the token that was read from a shallow layer, of
the token to be predicted from a deep one; the loss is the mean cosine distance. Used together with
`ContextNoise()`, it is reAR; sampling does not change.

From the paper, as its readers report it: both terms, the cosine distance, networks of two layers
with 2,048 hidden units, weight 1, layer 0 and layer 15 of 20 (18 of 24), true tokens as targets
also where the context is noisy. Ours: one network a term, SiLU inside, layer l as the state after l
blocks, three quarters of the depth by default.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.entities import Entities, take
from tessellar.protocol.generator import Generator
from tessellar.protocol.tokenizer import Quantizer, Tokenizer
from tessellar.training.methods.context_noise import require_teacher_forcing


@in_ranges
@dataclass(frozen=True)
class Recovery:
    """Options: layers count blocks passed, so 0 is what the first block reads; `deep` None is 3/4
    of the depth.
    """

    weight: float = 1.0
    shallow: int = 0
    deep: int | None = None
    hidden: int = 2048


@dataclass
class Trace:
    """What one teacher-forced pass left: hidden states [B, L, D] by layer, and its partition."""

    states: dict[int, Tensor] = field(default_factory=dict)
    entities: Entities | None = None


class EmbeddingRecovery(nn.Module):
    """The two networks, and their loss on a `Trace`.

    Raises UserError for a generator that does not read and predict one token a position, a
    tokenizer without exactly one codebook, or a layer that the generator does not have.
    """

    def __init__(self, settings: Recovery, generator: Generator, tokenizer: Tokenizer) -> None:
        super().__init__()
        model = require_teacher_forcing(generator, "recovery")
        self.settings = settings
        depth = len(model.layers)
        self.shallow = settings.shallow
        self.deep = round(depth * 3 / 4) if settings.deep is None else settings.deep
        if not 0 <= min(self.shallow, self.deep) <= max(self.shallow, self.deep) <= depth:
            raise UserError(
                f"recovery reads layers {self.shallow} and {self.deep} of a generator with 0 to {depth}"
            )
        if type(model).num_reads is not PrefixTransformer.num_reads:
            raise UserError(
                f"recovery needs one hidden state a token; {type(model).__name__} predicts several from one"
            )
        model.context_rows(model.entities)
        width = model.num_heads * model.head_dim
        codes = codebook(tokenizer).dim
        self.current, self.target = (
            nn.Sequential(
                nn.Linear(width, settings.hidden), nn.SiLU(), nn.Linear(settings.hidden, codes)
            )
            for _ in range(2)
        )

    @contextmanager
    def watch(self, generator: PrefixTransformer) -> Iterator[Trace]:
        """Keeps the hidden states of both layers of the pass that is made inside."""
        trace = Trace()
        handles = [watch_layer(generator, layer, trace) for layer in {self.shallow, self.deep}]
        try:
            yield trace
        finally:
            for handle in handles:
                handle.remove()

    def forward(
        self, trace: Trace, generator: PrefixTransformer, tokens: Tensor, tokenizer: Tokenizer
    ) -> Tensor:
        """Weighted loss, with code vectors of the true tokens [B, N] as targets."""
        assert trace.entities is not None
        order = trace.entities.order.expand(len(tokens), -1)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            vectors = at_least_float32(take(codebook(tokenizer).decode(tokens), order))
        rows, ranks = (index.to(tokens.device) for index in generator.context_rows(trace.entities))
        shallow = trace.states[self.shallow]
        deep = trace.states[self.deep]
        current = distance(self.current(shallow[:, shallow.shape[1] + rows]), vectors[:, ranks])
        target = distance(self.target(deep[:, -vectors.shape[1] :]), vectors)
        return self.settings.weight * (current + target)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean of 1 - cosine of vectors [..., C], at least in float32."""
    return 1 - F.cosine_similarity(at_least_float32(a), b, dim=-1).mean()


def codebook(tokenizer: Tokenizer) -> Quantizer:
    """The one quantizer of a tokenizer whose tokens have one vector each; raises UserError for any
    other tokenizer.
    """
    found = [module for module in tokenizer.modules() if isinstance(module, Quantizer)]
    if (
        len(found) != 1
        or len(tokenizer.layout.segments) != 1
        or not tokenizer.layout.is_categorical
    ):
        raise UserError(
            f"recovery needs a tokenizer with one codebook and one segment, not {tokenizer.layout}"
        )
    return found[0]


def watch_layer(generator: PrefixTransformer, layer: int, trace: Trace) -> RemovableHandle:
    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        trace.states[layer] = inputs[0]

    def behind(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        trace.states[layer] = output

    if layer == 0:
        return generator.layers[0].register_forward_pre_hook(before)
    return generator.layers[layer - 1].register_forward_hook(behind)

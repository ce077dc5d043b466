"""Open-MAGVIT2's generator: next-token prediction where a token is several sub-tokens (arXiv
2409.04410, section 3.2).

A Llama (LlamaGen's blocks) reads sums of the sub-tokens' embeddings behind a class position; for
each token a small transformer predicts its sub-tokens one after the other, from the Llama's hidden
state and the embeddings of the sub-tokens before. Guidance acts on logits, with a scale a sub-token
(`PerSubToken`). As in the official code the rotation of the class position, and so of the first
place inside of a token, is zero (cos = sin = 0), not the identity. Different from it: any number of
sub-tokens.

Shapes: R rows, B images, T tokens, F sub-tokens, V_f values of sub-token f, D width.
"""

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache, NoCache
from tessellar.layers.llama import LlamaBlock, Pass, Positions, swiglu_hidden
from tessellar.layers.precision import at_least_float32
from tessellar.models.llamagen.model import rope_table
from tessellar.models.parts.llama import ClassPrefix, LlamaGenerator
from tessellar.protocol.distribution import Distribution, FactorLogits, Head
from tessellar.protocol.entities import Entities, take, token_order
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Factorized, Layout


class IntraToken(nn.Module):
    """Logits of a token's sub-tokens, given its hidden state and the sub-tokens before each.

    Place f of a token reads the hidden state (f = 0) or the embedding of sub-token f - 1, behind
    blocks that see the places before it, and predicts sub-token f.
    """

    def __init__(
        self,
        embeddings: nn.ModuleList,
        vocabs: tuple[int, ...],
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        # A tuple: the tables are the generator's, which also reads them.
        self._embeddings = (embeddings,)
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.layers = nn.ModuleList(
            LlamaBlock(width, num_heads, hidden, norm_eps=norm_eps, dropout=dropout)
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.outputs = nn.ModuleList(nn.Linear(width, vocab, bias=False) for vocab in vocabs)

    def embedded(self, factor: int, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of values of a sub-token."""
        return self._embeddings[0][factor](ids)  # type: ignore[operator]

    def forward(self, states: Tensor, tokens: Tensor, positions: Positions) -> list[Tensor]:
        """Logits [n, V_f] of all sub-tokens of tokens [n, F] whose hidden states are [n, D]."""
        inputs = [states]
        for factor in range(len(self.outputs) - 1):
            inputs.append(self.embedded(factor, tokens[:, factor]))
        cache = NoCache(states.device)
        slots = cache.reserve(torch.arange(len(inputs))[None])
        hidden = self._run(torch.stack(inputs, 1), Pass(positions, cache, slots))
        return [output(hidden[:, factor]) for factor, output in enumerate(self.outputs)]

    def steps(self, states: Tensor, positions: Positions) -> Head:
        """(tokens so far [n, F], sub-token) to its logits [n, V_f], behind a cache: each call feeds
        one place more, in order.
        """
        cache = KVCache(
            len(self.layers),
            len(states),
            heads=self.num_heads,
            capacity=len(self.outputs),
            dim=self.head_dim,
            dtype=states.dtype,
            device=states.device,
        )

        def logits(known: Tensor, factor: int) -> Tensor:
            x = states if factor == 0 else self.embedded(factor - 1, known[:, factor - 1])
            own = Positions(positions.cos[:, factor, None], positions.sin[:, factor, None])
            shared = Pass(own, cache, cache.reserve(torch.tensor([[factor]])))
            hidden = self._run(x[:, None], shared)
            cache.commit()
            return self.outputs[factor](hidden[:, 0])

        return logits

    def _run(self, x: Tensor, shared: Pass) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, number, shared)
        return self.norm(x)


class OpenMAGVIT2AR(LlamaGenerator):
    """Class-conditional generator over one grid, or sequence, of tokens of several sub-tokens.

    Raises UserError for other layouts.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        intra_depth: int = 2,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
    ) -> None:
        super().__init__(
            width,
            depth,
            num_heads=num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            attention=attention,
        )
        kind = layout.segments[0].kind
        if len(layout.segments) > 1 or not isinstance(kind, Factorized):
            raise UserError(
                f"OpenMAGVIT2AR predicts tokens of several sub-tokens; this tokenizer gives {layout}"
            )
        self.layout = layout
        self.entities = token_order(layout)
        self.vocabs = kind.vocabs
        self.embeddings = nn.ModuleList(nn.Embedding(vocab, width) for vocab in kind.vocabs)
        self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.norm = nn.Identity()  # hidden states enter the small transformer as they are
        self.intra = IntraToken(
            self.embeddings,
            kind.vocabs,
            width=width,
            depth=intra_depth,
            num_heads=num_heads,
            hidden=swiglu_hidden(width, ffn_multiple_of),
            norm_eps=norm_eps,
            dropout=dropout,
        )
        cos, sin = rope_table(layout, self.conditioning.length, self.head_dim, rope_base)
        if len(cos) < len(self.vocabs):
            raise UserError(
                f"tokens of {len(self.vocabs)} sub-tokens need as many places in {layout}"
            )
        self.set_rotations(cos, sin)
        self.init_weights()
        for output in self.intra.outputs:
            nn.init.zeros_(output.weight)  # type: ignore[arg-type]  # the first loss is ln of all codes

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Input i is the i-th token generated: the sum of its sub-tokens' embeddings."""
        order = entities.order.expand(len(index), -1)
        place = order.gather(1, index.clamp(max=entities.length - 1))
        ids = tokens[:, place[0]] if len(place) == 1 else take(tokens, place)
        each = [table(ids[..., factor]) for factor, table in enumerate(self.embeddings)]
        return torch.stack(each).sum(0)

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> FactorLogits:  # type: ignore[override]
        """Sub-tokens of the tokens of generation `rank` [B, T], of their hidden states [R, T, D]."""
        states = hidden.flatten(0, 1)
        entity = state.entities.entity_at(rank)
        length = hidden.shape[1]
        positions = self.inside()

        def guided(logits: Tensor, factor: int) -> Tensor:
            return state.merge(at_least_float32(logits).unflatten(0, (-1, length)), entity, factor)

        def together(tokens: Tensor) -> list[Tensor]:
            rows = state.rows(tokens).flatten(0, 1)
            each = self.intra(states, rows, positions)
            return [guided(logits, factor) for factor, logits in enumerate(each)]

        def begin() -> Head:
            walk = self.intra.steps(states, positions)
            return lambda known, factor: guided(
                walk(state.rows(known).flatten(0, 1), factor), factor
            )

        return FactorLogits(
            lambda known, factor: together(known)[factor],
            tuple(range(len(self.vocabs))),
            (rank.shape[0], length),
            device=hidden.device,
            begin=begin,
            together=together,
        )

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> FactorLogits:  # type: ignore[override]
        return self.head_at(state, hidden, state.entities.steps(first, want))

    def losses_of(
        self, scores: Distribution, targets: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The sum over sub-tokens of their mean cross-entropies, all with weight 1."""
        assert isinstance(scores, FactorLogits)
        return {"cross_entropy": scores.cross_entropy(targets, weight)}

    def inside(self) -> Positions:
        """Rotations [1, F, ...] inside of a token: the first rows of the sequence's own table."""
        count = len(self.vocabs)
        return Positions(self.rope_cos[None, :count], self.rope_sin[None, :count])


# Published variants: width, depth, heads; depth inside of a token.     parameters (6 + 12 bits, 1,000 classes)
def open_magvit2_ar_b(layout: Layout, num_classes: int = 1000) -> OpenMAGVIT2AR:
    """343,570,432 parameters."""
    return OpenMAGVIT2AR(
        layout, 1024, depth=24, num_heads=16, intra_depth=2, num_classes=num_classes
    )


def open_magvit2_ar_l(layout: Layout, num_classes: int = 1000) -> OpenMAGVIT2AR:
    """804,362,240 parameters."""
    return OpenMAGVIT2AR(
        layout, 1280, depth=36, num_heads=20, intra_depth=3, num_classes=num_classes
    )


def open_magvit2_ar_xl(layout: Layout, num_classes: int = 1000) -> OpenMAGVIT2AR:
    """1,486,679,040 parameters."""
    return OpenMAGVIT2AR(
        layout, 1536, depth=48, num_heads=24, intra_depth=4, num_classes=num_classes
    )

"""IBQ's generator: LlamaGen's blocks, modulated by the class (AdaLN, arXiv 2412.02692, section 3.3).

The class is both the first position and what scales, shifts and gates every block, behind RMSNorms
that keep weights of their own; so are the states before the output. As in LlamaGen the rotation of
the class position is zero. Different from the official code: any categorical layout, and the cache
is an argument.
"""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.llama import LlamaBlock, Positions
from tessellar.models.llamagen.model import LlamaGen
from tessellar.models.parts.llama import ClassPrefix
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Layout


class AdaPass(NamedTuple):
    """What all blocks of one pass share; `condition` [R, 1, D] modulates them."""

    positions: Positions
    cache: KVCache | NoCache | PlacedCache
    slots: Slots
    condition: Tensor


class AdaLlamaBlock(LlamaBlock):
    """x += gate1 Attention(mod1(norm1 x)); x += gate2 SwiGLU(mod2(norm2 x))."""

    def __init__(self, width: int, num_heads: int, **options: Any) -> None:
        super().__init__(width, num_heads, **options)
        self.modulation = Modulation(width)

    def forward(self, x: Tensor, layer: int, shared: AdaPass) -> Tensor:  # type: ignore[override]
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(shared.condition)
        inputs = modulate(self.attention_norm(x), scale1, shift1)
        x = x + gate1 * self.dropout(self.attention(inputs, layer, shared))  # type: ignore[arg-type]
        inputs = modulate(self.ffn_norm(x), scale2, shift2)
        return x + gate2 * self.dropout(self.feed_forward(inputs))


class IBQAR(LlamaGen):
    """Class-conditional next-token generator of one vocabulary.

    `gate_scale` is how much smaller than other weights the gates' start (the deeper, the smaller).
    Raises UserError for a layout that is not categorical or has several vocabularies.
    """

    block_class: ClassVar[type[LlamaBlock]] = AdaLlamaBlock
    conditioning: ClassPrefix

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 16,
        num_heads: int = 16,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        gate_scale: float = 1e-3,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
    ) -> None:
        super().__init__(
            layout,
            width,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            condition_dropout=condition_dropout,
            dropout=dropout,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            rope_base=rope_base,
            attention=attention,
        )
        self.last_modulation = Modulation(width, count=2)
        self.init_modulations(gate_scale)

    def init_modulations(self, gate_scale: float) -> None:
        """Initialisation, beside `init_weights`.

        | rows of a modulation                 | distribution              |
        |--------------------------------------|---------------------------|
        | gates                                | N(0, 0.02 `gate_scale`)   |
        | scales and shifts, the last ones too | N(0, 0.01)                |
        | biases                               | 0                         |
        """
        for layer in self.layers:
            weight = layer.modulation.linear.weight  # type: ignore[union-attr]
            gates, others = weight.detach().tensor_split([2 * self.width])  # type: ignore[operator]
            nn.init.normal_(gates, std=0.02 * gate_scale)
            nn.init.normal_(others, std=0.01)
        nn.init.normal_(self.last_modulation.linear.weight, std=0.01)

    def class_embedding(self, condition: Condition) -> Tensor:
        """[R, 1, D], what modulates every block."""
        return self.conditioning.embedding(condition.ids)[:, None]

    def shared(self, place: Tensor, state: State, slots: Slots) -> AdaPass:  # type: ignore[override]
        assert state.cache is not None
        positions = self.positions(place, state)
        return AdaPass(positions, state.cache, slots, self.class_embedding(state.condition))

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Logits:
        scale, shift = self.last_modulation(self.class_embedding(state.condition))
        return super().head_at(state, modulate(hidden, scale, shift), rank)


# Published variants, on 16 x 16 tokens of 16,384 codes: width, depth, heads, start of the gates.    parameters
def ibq_ar_b(layout: Layout, num_classes: int = 1000) -> IBQAR:
    """342,994,944 parameters."""
    return IBQAR(layout, 1024, depth=16, num_heads=16, num_classes=num_classes, gate_scale=1e-3)


def ibq_ar_l(layout: Layout, num_classes: int = 1000) -> IBQAR:
    """649,640,960 parameters."""
    return IBQAR(layout, 1280, depth=20, num_heads=20, num_classes=num_classes, gate_scale=1e-3)


def ibq_ar_xl(layout: Layout, num_classes: int = 1000) -> IBQAR:
    """1,076,103,168 parameters."""
    return IBQAR(layout, 1536, depth=24, num_heads=24, num_classes=num_classes, gate_scale=1e-4)


def ibq_ar_xxl(layout: Layout, num_classes: int = 1000) -> IBQAR:
    """2,063,331,840 parameters."""
    return IBQAR(layout, 1920, depth=30, num_heads=30, num_classes=num_classes, gate_scale=1e-5)

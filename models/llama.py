"""Llama generators: a stack of Llama blocks behind a prefix (LlamaGen's backbone, arXiv 2406.06525)."""

from abc import abstractmethod

from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.kv_cache import Slots
from tessellar.layers.llama import LlamaBlock, Pass, Positions, swiglu_hidden
from tessellar.models.generator import State
from tessellar.models.prefix_transformer import PrefixTransformer


class LlamaGenerator(PrefixTransformer):
    """A subclass says where each place sits (`positions`), beside what `PrefixTransformer` asks for.

    The hidden width of the SwiGLU is `ffn_hidden`, or LlamaGen's rule; `num_kv_heads` groups queries.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attention: str = "auto",
        ffn_hidden: int | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads or num_heads % (num_kv_heads or num_heads):
            raise UserError(f"width {width}, {num_heads} heads and {num_kv_heads} key heads must divide one another")
        self.width, self.num_heads, self.head_dim = width, num_heads, width // num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        hidden = ffn_hidden or swiglu_hidden(width, ffn_multiple_of)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        residual_dropout = 0.0 if drop_path > 0 else dropout
        self.layers = nn.ModuleList(
            LlamaBlock(width, num_heads, hidden, norm_eps, residual_dropout, rate, attention, num_kv_heads)
            for rate in rates
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.embedding_dropout = nn.Dropout(dropout)

    @abstractmethod
    def positions(self, place: Tensor, state: State) -> Positions:
        """Rotations (and biases) at places [R or 1, n]; places past the end must be clamped here."""

    def shared(self, place: Tensor, state: State, slots: Slots) -> Pass:
        assert state.cache is not None
        return Pass(self.positions(place, state), state.cache, slots)

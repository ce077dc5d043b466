"""FLASH: a small semi-autoregressive drafter that reads the hidden states of a frozen generator
(SpecFLASH, arXiv 2505.12728).

    position j    [embedding of token j, hidden state that token j was drawn from] -> Linear(2 D, D)
                  -> causal Llama blocks -> MLP D, 4 D, K D: the hidden states of tokens j + 1 .. j + K
                  -> the generator's own output layer, frozen: the laws of K drafts

Given what is committed the K drafts are independent and their laws are known, so the usual
acceptance is exact (`tessellar/sampling/flash.py`). Training: smooth L1 to the generator's hidden
states, and a soft cross-entropy to its distribution, at every position of real tokens. There the
paper's visual tokens are an input that is compressed first; here they are what is generated, so
there is nothing to compress. The released model file does not run: this follows the paper. Ours:
rotations by the place of a token, and laws that may be guided ones (`guidance`).

Shapes: B images, T positions, K drafts, D channels of the generator, V codes, N tokens.
"""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache, NoCache
from tessellar.layers.llama import LlamaBlock, Pass, Positions, swiglu_hidden
from tessellar.layers.precision import at_least_float32
from tessellar.models.llamagen.model import rope_table
from tessellar.protocol.arguments import AMOUNTS
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.entities import Entities, take, token_order
from tessellar.protocol.generator import Evaluation, Generator, State, require_categorical
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Layout

ALONE = (
    "FLASH's drafter generates nothing by itself: sample the generator that it was trained with, by "
    "--algorithm FlashDrafts --algorithm.model PATH"
)


class FlashDrafter(Generator):
    """Drafts for a generator of `layout` that goes token by token, with `width` channels and
    `num_classes` classes.

    It is trained against that generator (`target` of the training module), and drafts for it alone.
    `guidance` is the scale of the laws that it learns: that of the images it will draft. Raises
    UserError for a layout that is not categorical or has several vocabularies.
    """

    ranges: ClassVar = {"hidden_weight": AMOUNTS, "soft_weight": AMOUNTS}
    draws_alone = False

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 1,
        num_heads: int = 12,
        num_classes: int = 1000,
        drafts: int = 5,
        guidance: float = 1.0,
        hidden_weight: float = 1.0,
        soft_weight: float = 0.1,
        mlp_ratio: float = 4.0,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if width % num_heads or drafts < 1:
            raise UserError(
                f"num_heads {num_heads} must divide width {width}, and drafts {drafts} be at least 1"
            )
        self.layout = layout
        self.entities = token_order(layout)
        vocab = require_categorical(layout, "FLASH's drafter")
        # The generator reads the condition; what is read here is what it made of it.
        self.conditioning = ClassConditioning(num_classes, dropout=0.0)
        self.width = width
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.drafts = drafts
        self.guidance = guidance
        self.hidden_weight = hidden_weight
        self.soft_weight = soft_weight
        self.token_embedding = nn.Embedding(vocab, width)
        self.fuse = nn.Linear(2 * width, width)
        self.layers = nn.ModuleList(
            LlamaBlock(
                width,
                num_heads,
                hidden=swiglu_hidden(width, ffn_multiple_of),
                norm_eps=norm_eps,
                implementation=attention,
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.fc1 = nn.Linear(width, int(mlp_ratio * width))
        self.fc2 = nn.Linear(int(mlp_ratio * width), drafts * width)
        # The generator's: `learn_from` copies it, and nothing trains it.
        self.output = nn.Linear(width, vocab, bias=False).requires_grad_(False)
        cos, sin = rope_table(layout, 0, self.head_dim, rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        #: A tuple, so that the generator's weights are no part of the drafter.
        self.target: tuple[Generator, ...] = ()
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02); biases at zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def learn_from(self, target: Generator) -> None:
        """Raises UserError for a generator of other tokens or width, and for one whose hidden states
        do not go through one linear layer.
        """
        name = type(target).__name__
        if target.layout != self.layout or set(target.entities.sizes) != {1}:
            raise UserError(
                f"FLASH drafts {self.layout} one by one; {name} generates {target.layout}"
            )
        head = getattr(target, "output", None)
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise UserError(
                f"FLASH needs a generator with one linear output layer; {name} has none"
            )
        if head.weight.shape != self.output.weight.shape:
            shape = tuple(head.weight.shape)
            raise UserError(
                f"the drafter has width {self.width} and {len(self.output.weight)} codes, {name} has "
                f"{shape[1]} and {shape[0]}: give its width"
            )
        with torch.no_grad():
            self.output.weight.copy_(head.weight)
        self.target = (target,)

    def states(self, tokens: Tensor, hidden: Tensor, shared: Pass) -> Tensor:
        """Hidden states [B, T, K, D] of the K tokens behind each of `tokens` [B, T], which were drawn
        from `hidden` [B, T, D].
        """
        read = torch.cat([self.token_embedding(tokens), hidden.to(self.fuse.weight.dtype)], -1)
        x = self.fuse(read)
        for number, layer in enumerate(self.layers):
            x = layer(x, number, shared)
        x = self.fc2(F.silu(self.fc1(self.norm(x))))
        return rearrange(x, "b t (k d) -> b t k d", k=self.drafts)

    def positions(self, place: Tensor) -> Positions:
        """Rotations of places [B or 1, T] of the layout; clamped past the end."""
        place = place.clamp(max=len(self.rope_cos) - 1).to(self.rope_cos.device)
        return Positions(self.rope_cos[place], self.rope_sin[place])

    def new_cache(self, batch: int, window: int) -> KVCache:
        """What decoding keeps of `batch` images; a window of `window` positions fits past the end."""
        weight = self.fuse.weight
        return KVCache(
            len(self.layers),
            batch,
            heads=self.num_heads,
            capacity=self.layout.length + window,
            dim=self.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def draft(
        self, cache: KVCache, tokens: Tensor, hidden: Tensor, order: Tensor, kept: Tensor
    ) -> Tensor:
        """Logits [B, K, V] of the tokens behind the first `kept` [B] of a window: `tokens` [B, T], and
        what they were drawn from, `hidden` [B, T, D].

        The window begins where the cache ends; of it what is kept stays there. `order` [N] are the
        places of tokens by generation rank.
        """
        rank = cache.lengths[:, None] + torch.arange(tokens.shape[1])
        slots = cache.reserve(rank)
        place = order[rank.clamp(max=len(order) - 1)]
        states = self.states(tokens, hidden, Pass(self.positions(place), cache, slots))
        cache.commit()
        cache.truncate(rank[:, 0] + kept)
        rows = torch.arange(len(tokens), device=tokens.device)
        last = (kept - 1).clamp(min=0).to(tokens.device)
        return at_least_float32(self.output(states[rows, last]))

    @torch.no_grad()
    def taught(self, tokens: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """What is learnt of images [B, N]: the generator's hidden states [B, N, D] of all tokens, and
        their guided log-probabilities [B, N, V].
        """
        if not self.target:
            raise UserError(
                "FLASH's drafter learns from a generator: give its export as --model.target"
            )
        (target,) = self.target
        target.to(tokens.device)
        scores = target.score(tokens, condition)  # type: ignore[operator]
        logits = scores.logits
        if self.guidance != 1:
            null = target.score(tokens, target.null(condition)).logits  # type: ignore[operator]
            logits = null + self.guidance * (logits - null)
        return scores.hidden, logits.float().log_softmax(-1)

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`hidden`: smooth L1 to the generator's states; `soft`: cross-entropy to its laws; both are
        means over drafts that are tokens of the image.
        """
        hidden, laws = self.taught(tokens, condition)
        (target,) = self.target
        order = target.entities.order.to(tokens.device)
        generated = take(tokens, order.expand(len(tokens), -1))
        length = generated.shape[1]
        rank = torch.arange(length - 1)[None]
        cache = NoCache(tokens.device)
        shared = Pass(self.positions(order[rank.to(order.device)]), cache, cache.reserve(rank))
        states = self.states(generated[:, :-1], hidden[:, :-1], shared)
        distance = torch.zeros(len(tokens), device=tokens.device)
        surprise = torch.zeros_like(distance)
        count = 0
        for ahead in range(min(self.drafts, length - 1)):
            # Draft `ahead` of position j is token j + 1 + ahead.
            made = states[:, : length - 1 - ahead, ahead]
            goal = hidden[:, 1 + ahead :].to(made.dtype)
            law = laws[:, 1 + ahead :]
            distance = distance + F.smooth_l1_loss(made, goal, reduction="none").mean(-1).sum(1)
            drafted = at_least_float32(self.output(made)).log_softmax(-1)
            surprise = surprise - (law.exp() * drafted).sum((1, 2))
            count += made.shape[1]
        weight = torch.ones_like(distance) if weight is None else weight
        share = weight / weight.sum().clamp(min=torch.finfo(distance.dtype).eps) / count
        return {
            "hidden": self.hidden_weight * (distance * share).sum(),
            "soft": self.soft_weight * (surprise * share).sum(),
        }

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        return Evaluation(self.loss(tokens, condition), None)

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        raise UserError(ALONE)

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Distribution:
        raise UserError(ALONE)

"""Token-Shuffle: the s x s codes of a window are one position of a causal Llama (arXiv 2504.17789).

Codes are compressed to D / s^2 channels and concatenated (shuffle); an output state becomes s^2
features for the vocabulary head (un-shuffle), so the codes of a window are independent given the
windows before it. There is no official code. Choices of ours where the paper is silent, all
arguments: one linear layer compresses and expands, MLP blocks of ratio 1 with exact GELU and no
norm that start as the identity, consecutive one-dimensional positions (`rotary`), text loss and
z-loss weights, no dropout; on a sequence a window is s^2 consecutive codes.
"""

from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache
from tessellar.layers.llama import Positions, frequencies
from tessellar.layers.precision import at_least_float32
from tessellar.models.llamagen.model import rope_table
from tessellar.models.parts.joint_text import JointText
from tessellar.models.parts.llama import CaptionPrefix, ClassPrefix, LlamaGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, cells
from tessellar.protocol.generator import Evaluation, Prefix, State, require_categorical
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.protocol.layout import Layout, Segment
from tessellar.protocol.work import Work, linear_macs

HIGH_RESOLUTION = 16_384
"""Codes of a 2048 x 2048 image at f16, from which on the paper needs a z-loss."""


class ResidualMLP(nn.Module):
    """x + fc2(GELU(fc1 x))."""

    def __init__(self, width: int, ratio: float = 1.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, round(width * ratio))
        self.fc2 = nn.Linear(round(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Shuffle(nn.Module):
    """Embeddings of a window's codes [..., c, D] to one fused input [..., D]."""

    def __init__(self, width: int, codes: int, depth: int, ratio: float, project: bool) -> None:
        super().__init__()
        self.compress = nn.Linear(width, width // codes) if project else nn.Identity()
        self.blocks = nn.Sequential(*(ResidualMLP(width, ratio) for _ in range(depth)))

    def concatenate(self, x: Tensor) -> Tensor:
        """Compressed and side by side, before the MLP blocks."""
        return rearrange(self.compress(x), "... c d -> ... (c d)")

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.concatenate(x))


class Unshuffle(nn.Module):
    """Hidden states [..., D] to features of the window's codes [..., c, D]."""

    def __init__(self, width: int, codes: int, depth: int, ratio: float, project: bool) -> None:
        super().__init__()
        self.codes = codes
        self.blocks = nn.Sequential(*(ResidualMLP(width, ratio) for _ in range(depth)))
        self.expand = nn.Linear(width // codes, width) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(rearrange(self.blocks(x), "... (c d) -> ... c d", c=self.codes))


class Predictions(NamedTuple):
    """Teacher-forced logits over the joint vocabulary with their targets; text only where it is
    modelled jointly.
    """

    logits: Tensor  # [B, N, V], codes in generation order
    targets: Tensor  # [B, N]
    text_logits: Tensor | None = None  # [B, P, V]: next text tokens, begin of image, end of image
    text_targets: Tensor | None = None  # [B, P], -100 behind padding


def windows(layout: Layout, window: int) -> Entities:
    """`window` x `window` cells of a grid, or window^2 consecutive tokens of a sequence."""
    return cells(layout, window, window) if layout.grid else cells(layout, 1, window**2)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T] of logits [B, T, V]; 0 where the target is IGNORED."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )


def weighted_mean(values: Tensor, count: int | Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of values [B, T] over the number `count` (or [B]) of each row; `weight` [B] weighs
    samples.
    """
    weight = torch.ones(len(values), device=values.device) if weight is None else weight
    total = (weight * count).sum().clamp(min=torch.finfo(values.dtype).eps)
    return (values.sum(1) * weight).sum() / total


class TokenShuffle(LlamaGenerator):
    """Next-window generator over one grid or sequence of categorical tokens.

    Conditioned on `num_classes`, on caption features (`caption_dim`, `caption_length`), or on
    caption tokens that it models too (`text_vocab` ids, `bos` among them begins a text). `rotary`
    "grid" is LlamaGen's rotation over the grid of windows: with window 1 and no blocks the model is
    LlamaGen. `project` False leaves compress and expand out (default where a window is one code),
    `tied` shares embedding and head, `z_loss` None is 1e-5 from 2048 x 2048 on.
    """

    conditioning: ClassPrefix | CaptionPrefix | JointText

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        window: int = 2,
        mlp_blocks: int = 2,
        mlp_ratio: float = 1.0,
        num_classes: int | None = None,
        caption_dim: int | None = None,
        caption_length: int = 120,
        text_vocab: int | None = None,
        bos: int = 0,
        condition_dropout: float = 0.1,
        text_loss_weight: float = 1.0,
        z_loss: float | None = None,
        rotary: Literal["sequence", "grid"] = "sequence",
        rope_base: float = 10000.0,
        project: bool | None = None,
        tied: bool = False,
        num_kv_heads: int | None = None,
        ffn_hidden: int | None = None,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        attention: str = "auto",
        zero_init_residual: bool = False,
    ) -> None:
        # Vocabulary with joint text: [text 0 .. T - 1, BOI, EOI, codes]; `offset` = T + 2, else 0.
        given = [num_classes is not None, caption_dim is not None, text_vocab is not None]
        if sum(given) != 1:
            raise UserError(
                "TokenShuffle needs exactly one of num_classes, caption_dim and text_vocab"
            )
        codes = window**2
        if window < 1 or width % codes:
            raise UserError(
                f"windows of {window}x{window} codes need a width that {codes} divides; it is {width}"
            )
        sizes = (ffn_multiple_of, norm_eps, dropout, 0.0, attention, ffn_hidden, num_kv_heads)
        super().__init__(width, depth, num_heads, *sizes)
        self.layout = layout
        self.entities = windows(layout, window)
        self.codes = codes
        self.text_loss_weight = text_loss_weight
        if z_loss is None:
            z_loss = 1e-5 if layout.length >= HIGH_RESOLUTION else 0.0
        self.z_loss = z_loss
        vocab = require_categorical(layout, "TokenShuffle")
        if num_classes is not None:
            self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        elif caption_dim is not None:
            self.conditioning = CaptionPrefix(
                caption_dim, caption_length, width=width, dropout=condition_dropout
            )
        else:
            assert text_vocab is not None
            self.conditioning = JointText(
                text_vocab, caption_length, bos=bos, dropout=condition_dropout
            )
        self.offset = (
            self.conditioning.joint_vocab if isinstance(self.conditioning, JointText) else 0
        )
        self.token_embedding = nn.Embedding(self.offset + vocab, width)
        project = codes > 1 if project is None else project
        self.shuffle = Shuffle(width, codes, mlp_blocks, mlp_ratio, project)
        self.unshuffle = Unshuffle(width, codes, mlp_blocks, mlp_ratio, project)
        self.output = None if tied else nn.Linear(width, self.offset + vocab, bias=False)
        self.set_rotary(rotary, window, rope_base)
        self.init_weights(zero_init_residual)

    def set_rotary(self, rotary: str, window: int, base: float) -> None:
        """Tables of LlamaGen's rotation over the grid of windows, or the frequencies of consecutive
        positions.
        """
        tables = torch.empty(0), torch.empty(0)
        if rotary == "grid":
            if isinstance(self.conditioning, JointText):
                raise UserError(
                    "rotary `grid` needs a prefix of fixed length: classes or caption features"
                )
            (segment,) = self.layout.segments
            sides = [side // window for side in segment.shape]
            fused = Segment(
                (self.entities.count,) if self.layout.grid is None else tuple(sides), segment.kind
            )
            tables = rope_table(Layout((fused,)), self.conditioning.length, self.head_dim, base)
        self.rotary = rotary
        self.set_rotations(*tables)
        self.register_buffer(
            "rope_frequencies", frequencies(self.head_dim // 2, base), persistent=False
        )
        self.rope_frequencies: Tensor

    def init_weights(self, zero_init_residual: bool = False) -> None:
        """As every Llama generator, and

        | weight                       | distribution                                                      |
        |------------------------------|-------------------------------------------------------------------|
        | biases                       | 0                                                                 |
        | compress, expand             | N(0, 1 / inputs), which keeps the scale of what passes            |
        | fc2 of MLP blocks            | 0, so each starts as the identity (a warm start stays whole)      |
        """
        super().init_weights(zero_init_residual)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, ResidualMLP):
                nn.init.zeros_(module.fc2.weight)
        for layer in (self.shuffle.compress, self.unshuffle.expand):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    @property
    def prefix_length(self) -> int:
        """With the begin of the image, where text is joint."""
        return self.conditioning.length + isinstance(self.conditioning, JointText)

    def work(self) -> Work:
        """MLP blocks once a window; compress, expand and the vocabulary once a code, which windows
        do not make less.
        """
        blocks = super().work()
        a_window = linear_macs(self.shuffle.blocks) + linear_macs(self.unshuffle.blocks)
        a_code = linear_macs(self.shuffle.compress) + linear_macs(self.unshuffle.expand)
        vocabulary = self.token_embedding.weight.numel()
        texts = self.prefix_length if isinstance(self.conditioning, JointText) else 0
        around = a_window * self.entities.count + a_code * self.layout.length
        return blocks._replace(around=around + vocabulary * (self.layout.length + texts))

    def prefix(self, condition: Condition) -> Prefix:
        if not isinstance(self.conditioning, JointText):
            return super().prefix(condition)
        ids, valid = self.conditioning.tokens(condition)
        return Prefix(self.token_embedding(ids), valid.cpu())

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Input i is the i-th window; in the joint vocabulary the end of the image follows the last
        one.
        """
        ranks = index[..., None] * self.codes + torch.arange(self.codes, device=index.device)
        places = entities.order.expand(len(index), -1).gather(
            1, ranks.flatten(1).clamp(max=entities.length - 1)
        )
        ids = (
            tokens[:, places[0]] if len(places) == 1 else tokens.gather(1, places.to(tokens.device))
        )
        ids = rearrange(ids + self.offset, "r (n c) -> r n c", c=self.codes)
        fused = self.shuffle(self.token_embedding(ids))
        if isinstance(self.conditioning, JointText):
            end = (index >= entities.count).to(fused.device)[..., None]
            fused = torch.where(end, self.token_embedding.weight[self.conditioning.eoi], fused)
        return fused

    def code_embeddings(self) -> Tensor:
        """Without the rows of text, where that is joint."""
        return self.token_embedding.weight[self.offset :]

    def positions(self, place: Tensor, state: State) -> Positions:
        if self.rotary == "grid":
            return super().positions(place, state)
        valid = state.prefix.valid  # type: ignore[union-attr]
        if valid is not None and (state.input_size is not None or not bool(valid.all())):
            # Counted from the first real token.
            place = (place - (~valid).sum(1, keepdim=True)).clamp(min=0)
        angles = place.to(self.rope_frequencies.device)[..., None] * self.rope_frequencies
        return Positions(angles.cos(), angles.sin())

    def num_reads(self, state: State, first: Tensor, want: int) -> int:
        return want

    def logits(self, features: Tensor, first: int = 0) -> Tensor:
        """Logits of features [..., D] over the joint vocabulary from id `first` on."""
        if first == 0 and self.output is not None:
            return at_least_float32(self.output(features))
        weight = self.token_embedding.weight if self.output is None else self.output.weight
        return at_least_float32(F.linear(features, weight[first:]))

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        """Logits of image codes alone."""
        logits = rearrange(self.logits(self.unshuffle(hidden), self.offset), "r n c v -> r (n c) v")
        return Logits(state.merge(logits, state.entities.entity_of(first, want)))

    def hidden_states(self, tokens: Tensor, condition: Condition, more: int = 0) -> Tensor:
        """Normed states [B, P + M - 1 + more, D] of the prefix and the windows but the last.

        `more` (at most 2) adds the last window and the end of the image.
        """
        state = self._state(condition, NO_GUIDANCE, self.entities)
        assert state.input_ends is not None
        state.cache = NoCache(tokens.device)
        return self.norm(
            self._run(state, torch.arange(int(state.input_ends[-1]) + more)[None], tokens)
        )

    def predictions(self, tokens: Tensor, condition: Condition) -> Predictions:
        """Logits and targets of everything that training predicts."""
        joint = self.conditioning if isinstance(self.conditioning, JointText) else None
        hidden = self.hidden_states(tokens, condition, 1 if joint else 0)
        count = self.entities.count
        before = hidden.shape[1] - count - (1 if joint else 0)
        features = rearrange(
            self.unshuffle(hidden[:, before : before + count]), "b n c d -> b (n c) d"
        )
        image = (
            self.logits(features),
            tokens[:, self.entities.order.to(tokens.device)] + self.offset,
        )
        if joint is None:
            return Predictions(*image)
        text = torch.cat([hidden[:, :before], hidden[:, -1:]], dim=1)
        return Predictions(*image, self.logits(text), joint.targets(condition))

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`cross_entropy` and `text` are means over codes and over text tokens; `text_balance` is what
        makes a text token count `text_loss_weight` of a code in the sum of all, which is minimised.
        """
        made = self.predictions(tokens, self.drop_condition(condition))
        mean = partial(weighted_mean, weight=weight)
        losses = {"cross_entropy": mean(cross_entropy(made.logits, made.targets), tokens.shape[1])}
        squares = made.logits.logsumexp(-1).square()
        predicted = tokens.shape[1] * torch.ones(len(tokens))
        if made.text_logits is not None and made.text_targets is not None:
            real = made.text_targets >= 0
            nats = cross_entropy(made.text_logits, made.text_targets)
            share = self.text_loss_weight * mean(nats, tokens.shape[1])
            losses["text"] = mean(nats, real.sum(1))
            losses["text_balance"] = share - losses["text"]
            predicted = predicted.to(real.device) + real.sum(1)
            squares = torch.cat([squares, made.text_logits.logsumexp(-1).square() * real], dim=1)
        if self.z_loss:
            losses["z"] = self.z_loss * mean(squares, predicted.to(tokens.device))
        return losses

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        """Two passes: the loss is over the joint vocabulary, nats are of image codes alone, as they
        are drawn.
        """
        return Evaluation(self.loss(tokens, condition), self.nats(tokens, condition))


# Published variant; heads, FFN and text vocabulary are the only near combination with 2.7 billion
# parameters [ours].
def token_shuffle_2b7(layout: Layout, window: int = 2, mlp_blocks: int = 2) -> TokenShuffle:
    """2,789,634,816 parameters on 16,384 codes, windows of 2; reads and writes Llama 3's 128,256
    text ids.
    """
    return TokenShuffle(
        layout,
        3072,
        20,
        24,
        window,
        mlp_blocks,
        text_vocab=128_256,
        caption_length=512,
        tied=True,
        ffn_hidden=8192,
        rope_base=500_000.0,
        bos=128_000,
    )


def token_shuffle_2b7_first(layout: Layout) -> TokenShuffle:
    """2,709,390,336 parameters: the paper's first stage, one code a position and no shuffle."""
    return token_shuffle_2b7(layout, window=1, mlp_blocks=0)


# LlamaGen's sizes with a class prefix.   parameters on 16,384 codes, windows of 2, 1,000 classes
def token_shuffle_b(layout: Layout, window: int = 2, num_classes: int = 1000) -> TokenShuffle:
    """115,909,056 parameters."""
    return TokenShuffle(layout, 768, 12, 12, window, num_classes=num_classes)


def token_shuffle_l(layout: Layout, window: int = 2, num_classes: int = 1000) -> TokenShuffle:
    """351,833,344 parameters."""
    return TokenShuffle(layout, 1024, 24, 16, window, num_classes=num_classes)

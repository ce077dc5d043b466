"""TokenFlow's generator: a Llama that predicts the tokens of a scale at once, behind a text or a class
(arXiv 2412.03069).

    place    0 .. P - 2     P - 1          P .. P + 3    P + 4 ..
    reads    text, class    the last of it map, 2 x 2    map, 3 x 3, of all coarser codes
    predicts -              scale 1 x 1    scale 2 x 2   scale 3 x 3

The map is enlarged from scale to scale and codes are added at their own (`next_inputs` of the
tokenizer). Blocks norm what their branches give, not what they read; queries and keys are normed per
head. `predict_again` draws a scale from its own draft (the paper's multi-step sampling). Different
from the official code: a cache, a class in place of a text, and captions are dropped in training.
"""

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache, NoCache
from tessellar.layers.llama import AttentionKind, LlamaBlock, Pass, frequencies
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.models.parts.llama import ClassPrefix, LlamaGenerator
from tessellar.models.parts.scale_reader import ScaleReader
from tessellar.models.tokenflow.text import PaddedText
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities, scales
from tessellar.protocol.generator import Evaluation, Prefix, State, require_categorical
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.protocol.layout import Layout


class OutputNormBlock(LlamaBlock):
    """A Llama block whose norms act on the outputs of its branches."""

    def forward(self, x: Tensor, layer: int, shared: Pass) -> Tensor:
        attended = self.attention_norm(self.attention(x, layer, shared))
        x = x + self.drop_path(self.dropout(attended))
        return x + self.drop_path(self.dropout(self.ffn_norm(self.feed_forward(x))))


class TokenFlowAR(ScaleReader, LlamaGenerator):
    """Next-scale generator over a pyramid of grids with one vocabulary, coarsest 1 x 1.

    Give `num_classes`, or `text_vocab` ids of texts of at most `text_length` tokens; `opening` and
    `closing` are the ids of the marks around an image, `negative` the text that guidance moves away
    from. In training the closing marks are predicted too. Its tokenizer must be bound
    (`ImageGenerator` does it). Raises UserError for other layouts, and for a tokenizer that has no
    inputs of next scales or others than `latent_dim` channels.
    """

    conditioning: ClassPrefix | PaddedText  # type: ignore[assignment]
    output: nn.Linear
    block_class = OutputNormBlock

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int | None = None,
        text_vocab: int | None = None,
        text_length: int = 128,
        opening: tuple[int, ...] = (),
        closing: tuple[int, ...] = (),
        bos: int = 0,
        negative: tuple[int, ...] = (),
        latent_dim: int = 40,
        condition_dropout: float = 0.1,
        dropout: float = 0.0,
        ffn_hidden: int | None = None,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        qk_norm_eps: float = 1e-6,
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
            ffn_hidden=ffn_hidden,
            attention_kind=AttentionKind(qk_norm=True, qk_norm_eps=qk_norm_eps),
        )
        if (num_classes is None) == (text_vocab is None):
            raise UserError("TokenFlowAR needs either num_classes or text_vocab")
        self.layout = layout
        self.entities = scales(layout)
        self.latent_dim = latent_dim
        vocab = require_categorical(layout, "TokenFlowAR")
        if self.first != 1:
            raise UserError(f"TokenFlowAR begins with one token; this tokenizer gives {layout}")
        # Codes stand behind the text in one vocabulary; as inputs they are never looked up.
        self.offset = 0
        self.token_embedding = None
        if text_vocab is not None:
            self.conditioning = PaddedText(
                text_vocab,
                text_length,
                opening=opening,
                closing=closing,
                bos=bos,
                negative=negative,
                dropout=condition_dropout,
            )
            self.offset = self.conditioning.joint_vocab
            self.token_embedding = nn.Embedding(self.offset + vocab, width)
        else:
            assert num_classes is not None
            self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.project = nn.Sequential(
            nn.Linear(latent_dim, width), nn.GELU(), nn.Linear(width, width)
        )
        # Row 0 is of the prefix and of what follows the image, row k + 1 of scale k; row 1 is unused.
        self.scale_embedding = nn.Embedding(self.entities.count + 1, width)
        self.place_embedding = nn.Parameter(torch.empty(layout.length, width))
        self.output = nn.Linear(width, self.offset + vocab, bias=False)
        places = self.prefix_length + layout.length + len(self.closing)
        angles = torch.arange(places)[:, None] * frequencies(self.head_dim // 2, rope_base)
        self.set_rotations(angles.cos(), angles.sin())
        self.init_weights()

    def code_embeddings(self) -> Tensor | None:
        """Without the rows of text, where that is joint."""
        rows = super().code_embeddings()
        return None if rows is None else rows[self.offset :]

    def init_weights(self, zero_init_residual: bool = False) -> None:
        """As every Llama generator; places N(0, 0.02)."""
        super().init_weights(zero_init_residual)
        nn.init.normal_(tag(self.place_embedding, "no_decay"), std=0.02)

    @property
    def closing(self) -> tuple[int, ...]:
        """Ids of the marks behind an image."""
        return self.conditioning.closing if isinstance(self.conditioning, PaddedText) else ()

    def prefix(self, condition: Condition) -> Prefix:
        valid = None
        if isinstance(self.conditioning, PaddedText):
            assert self.token_embedding is not None
            ids, valid = self.conditioning.tokens(condition)
            embeddings = self.token_embedding(ids)
            valid = valid.cpu()
        else:
            embeddings = super().prefix(condition).embeddings
        embeddings = embeddings + self.scale_embedding.weight[0]
        # Its last place is the input of the first scale, and has that scale's place.
        last = embeddings[:, -1:] + self.place_embedding[:1]
        return Prefix(torch.cat([embeddings[:, :-1], last], dim=1), valid)

    def embed_inputs(self, inputs: Tensor, index: Tensor) -> Tensor:
        place = index + 1
        inside = self.ranks(index)
        x = self.placed(inputs, inside)
        behind = (place - self.layout.length).clamp(min=0)
        if not bool((place > inside).any()):
            return x
        closed = (place > inside).to(x.device)[..., None]
        return torch.where(closed, self.closing_inputs(behind), x)

    def placed(self, maps: Tensor, place: Tensor) -> Tensor:
        """Embeddings [R, n, D] of maps [R, n, C] at places [R or 1, n] of the layout."""
        scale = self.scale_of(place).to(maps.device)
        projected = self.project(maps.to(self.place_embedding.dtype))
        return projected + self.scale_embedding(scale + 1) + self.place_embedding[place]

    def closing_inputs(self, behind: Tensor) -> Tensor:
        """Embeddings of what stands `behind` the image [R or 1, n]: nothing at first, then the
        closing marks.
        """
        rows = torch.zeros(1, self.width, device=self.place_embedding.device)
        if self.closing:
            assert self.token_embedding is not None
            marks = torch.tensor(self.closing, device=rows.device)
            rows = torch.cat([rows, self.token_embedding(marks)])
        rows = rows.to(self.place_embedding.dtype) + self.scale_embedding.weight[0]
        return rows[behind.clamp(max=len(rows) - 1)]

    def block(self, place: Tensor) -> Tensor:
        """Even numbers; those in between are for a scale that is predicted again."""
        of_image = (place - self.prefix_length + 1).clamp(min=0)
        return 2 * torch.where(
            of_image > 0, self.prefix_length - 1 + self.scale_of(of_image), place
        )

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        return entities.ends + prefix_length - 1

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Logits:
        """Logits of image codes alone."""
        weight = self.output.weight[self.offset :]
        logits = at_least_float32(nn.functional.linear(hidden, weight))
        return Logits(state.merge(logits, state.entities.entity_at(rank)))

    def predict_again(self, state: State, tokens: Tensor) -> Distribution:
        # The scale that was predicted last, of maps that hold its own codes as well. Later scales
        # go on reading the maps without them: what is computed here is forgotten.
        first = state.fed - 1
        assert isinstance(state.cache, KVCache)
        place = state.entities.steps(first, 1)[:1]
        if int(place[0, 0]) < self.first:
            raise UserError(
                "the first scale is predicted from the text alone: it has no draft to read"
            )
        own = self.own_codes(state.rows(tokens)[:, place[0]])
        maps = self.inputs(state, tokens, place) + own
        x = self.embedding_dropout(self.placed(maps, place))
        in_sequence = place + self.prefix_length - 1
        # An odd number, behind all coarser scales: it sees itself, but not the pass that drew it.
        slots = state.cache.reserve(self.visibility(state, in_sequence) - 1)
        hidden = self.through_layers(x, self.shared(in_sequence, state, slots))
        return self._distribution(state, hidden, hidden.shape[1], first, 1)

    def own_codes(self, tokens: Tensor) -> Tensor:
        """What tokens [R, n] add at their own scale, [R, n, C]."""
        vectors = getattr(self.bound[0], "code_vectors", None)
        if vectors is None:
            raise UserError(
                f"{type(self.bound[0]).__name__} does not say what codes add at their own scale: scales cannot be "
                "predicted again"
            )
        return vectors(tokens)

    def hidden_states(self, tokens: Tensor, condition: Condition) -> Tensor:
        """Normed states [B, N + m, D] that predict the codes of tokens [B, N] and the m closing
        marks.
        """
        state = self._state(condition, NO_GUIDANCE, self.entities)
        assert state.input_ends is not None
        state.cache = NoCache(tokens.device)
        end = int(state.input_ends[-1]) + len(self.closing)
        hidden = self._run(state, torch.arange(end)[None], self.read(tokens, self.entities))
        return self.norm(hidden[:, self.prefix_length - 1 :])

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Mean over codes and closing marks, over the whole vocabulary."""
        hidden = self.hidden_states(tokens, self.drop_condition(condition))
        closing = torch.tensor(self.closing, dtype=tokens.dtype, device=tokens.device)
        targets = torch.cat([tokens + self.offset, closing.expand(len(tokens), -1)], 1)
        scores = Logits(at_least_float32(self.output(hidden)))
        return {"cross_entropy": scores.cross_entropy(targets, weight)}

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        """Two passes: the loss is over the whole vocabulary, nats are of codes alone, as they are
        drawn.
        """
        return Evaluation(self.loss(tokens, condition), self.nats(tokens, condition))


def tokenflow_7b(
    layout: Layout,
    opening: tuple[int, ...] = (),
    closing: tuple[int, ...] = (),
    negative: tuple[int, ...] = (),
) -> TokenFlowAR:
    """7,027,204,096 parameters on the 817 tokens of `tokenflow_b_256`; texts are ids of Llama 2, 128
    with padding, and so are the pieces of the marks `<img>` (`opening`) and `</img>` with the end of
    the text (`closing`).
    """
    return TokenFlowAR(
        layout,
        4096,
        depth=32,
        num_heads=32,
        text_vocab=32_000,
        text_length=128,
        opening=opening,
        closing=closing,
        bos=1,
        negative=negative,
        ffn_hidden=11_008,
    )

"""SEED: 32 causal tokens of what an image means (arXiv 2307.08041; SEED-2, arXiv 2310.01218).

    image -> frozen ViT -> causal Q-Former -> Linear, Tanh, Linear -> code -> Linear, Tanh, Linear
                                                              -> blocks -> causal states, again
                                                              -> blocks -> embedding of the image -> image

Three stages. "contrastive" trains the Q-Former on images and their captions; "codebook" freezes it and
trains all behind it, on the embeddings of CLIP; "detokenizer" trains a small decoder of ours from that
embedding to pixels (`detokenizer.py`). Token i depends on queries up to i, but a prefix is not
decoded alone. What is drawn means what the image meant, and has another layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar import distributed
from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.networks.vision import Teacher
from tessellar.protocol.arguments import AMOUNTS, in_ranges
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.tokenizer import QuantizedTokenizer, TokenizerOutput
from tessellar.text.conditioners import CaptionConditioner
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.seed.detokenizer import Detokenizer, UnCLIP
from tessellar.tokenizers.seed.embedding import (
    NarrowedHead,
    QueryBlocks,
    ReverseHead,
    embedding_of,
)
from tessellar.tokenizers.seed.qformer import CausalQFormer
from tessellar.tokenizers.seed.vision import EvaVision, TimmVision

Stage = Literal["contrastive", "codebook", "detokenizer"]
NARROW = (256, 128, 32)
START_TEMPERATURE = 0.07
OF_CONTRASTIVE = ("vision_head.", "text_head.", "temperature", "captions.", "qformer.text.")


class Vision(Protocol):
    """What the queries read."""

    dim: int

    def tokens(self, images: Tensor) -> Tensor:
        """[B, S, dim] of images [B, 3, H, W] in [-1, 1]."""
        ...


@in_ranges
@dataclass(frozen=True)
class BertSize:
    """Of the causal Q-Former; BERT-base's as published."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072


@in_ranges
@dataclass(frozen=True)
class TextSide:
    """Of the contrastive stage: a byte-level BPE learnt from the captions (theirs is BERT's), texts of
    `length` ids, and the `dim` channels in which images and texts meet.
    """

    vocab_size: int = 1024
    length: int = 32
    dim: int = 256
    label_smoothing: float = 0.1


@in_ranges
@dataclass(frozen=True)
class CodebookLosses:
    """Weights of the codebook stage."""

    vq: float = 5.0
    distill: float = 0.5
    reconstruct: float = 2.0
    codebook: float = (
        0.25  # of the codebook's term beside 1 of the commitment (taming's legacy form)
    )

    ranges: ClassVar = {
        "vq": AMOUNTS,
        "distill": AMOUNTS,
        "reconstruct": AMOUNTS,
        "codebook": AMOUNTS,
    }


class SEED(QuantizedTokenizer):
    """`num_tokens` tokens of square images of `image_size`.

    `text`: what the contrastive stage has beside (None: no texts). `teacher` gives the embeddings of
    `embedding_dim` channels that the codebook stage learns. `reverse`: one query reads the codes for
    the embedding (the repository's training code), else they are narrowed (the published SEED-2).
    Raises UserError for parts that do not fit each other, and for a stage without what it learns.
    """

    quantizer: VectorQuantizer

    def __init__(
        self,
        vision: EvaVision | TimmVision,
        image_size: int = 224,
        num_tokens: int = 32,
        vocab_size: int = 8192,
        code_dim: int = 32,
        qformer_size: BertSize = BertSize(),  # noqa: B008
        decoder_depth: int = 4,
        decoder_heads: int = 12,
        embedding_dim: int = 1024,
        reverse: bool = False,
        detokenizer: Detokenizer | None = None,
        teacher: Teacher | None = None,
        text: TextSide | None = None,
        weights: CodebookLosses = CodebookLosses(),  # noqa: B008
        dropout: float = 0.1,
        stage: Stage = "codebook",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if stage not in ("contrastive", "codebook", "detokenizer"):
            raise UserError(
                f'stage is {stage!r}; it must be "contrastive", "codebook" or "detokenizer"'
            )
        if stage == "contrastive" and text is None:
            raise UserError('stage "contrastive" learns from captions: give text')
        if stage == "detokenizer" and (detokenizer is None or isinstance(detokenizer, UnCLIP)):
            raise UserError('stage "detokenizer" trains one: give a PixelDetokenizer')
        width = qformer_size.width
        self.image_size = (image_size, image_size)
        self.layout = sequence_layout(num_tokens, Categorical(vocab_size))
        self.stage = stage
        self.loss_weights = weights
        self.text = text
        self.teacher = teacher
        self.vision = vision
        self.vision_norm = nn.LayerNorm(vision.dim)
        self.queries = tag(nn.Parameter(torch.zeros(1, num_tokens, width)), "no_decay")
        self.qformer = CausalQFormer(
            width,
            qformer_size.depth,
            qformer_size.num_heads,
            hidden=qformer_size.hidden,
            memory_dim=vision.dim,
            text_vocab=None if text is None else text.vocab_size,
            text_length=1 if text is None else text.length,
            dropout=dropout,
            attention=attention,
        )
        self.to_code = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.quantizer = VectorQuantizer(
            vocab_size,
            code_dim,
            l2_normalize=False,
            codebook_weight=weights.vq * weights.codebook,
            commitment_weight=weights.vq,
        )
        self.from_code = nn.Sequential(
            nn.Linear(code_dim, code_dim), nn.Tanh(), nn.Linear(code_dim, width)
        )
        self.recalling = QueryBlocks(num_tokens, width, decoder_depth, decoder_heads, attention)
        self.meaning = QueryBlocks(num_tokens, width, decoder_depth, decoder_heads, attention)
        if reverse:
            self.embedding_head: nn.Module = ReverseHead(
                width,
                qformer_size.depth,
                qformer_size.num_heads,
                hidden=qformer_size.hidden,
                dim=embedding_dim,
                attention=attention,
            )
        else:
            self.embedding_head = NarrowedHead(num_tokens, width, NARROW, embedding_dim)
        self.detokenizer = detokenizer
        if text is not None:
            self.captions = CaptionConditioner(text.vocab_size, text.length)
            self.vision_head = nn.Linear(width, text.dim)
            self.text_head = nn.Linear(width, text.dim)
            self.temperature = nn.Parameter(torch.tensor(START_TEMPERATURE))
        self.init_weights()
        self.requires_grad_(False)
        for part in self.trained_parts():
            part.requires_grad_(True)

    def init_weights(self) -> None:
        """BERT's N(0, 0.02) for linear layers, embeddings, queries and positions, biases 0; the vision
        model and a detokenizer are not touched.
        """
        own = (self.qformer, self.to_code, self.from_code, self.recalling, self.meaning)
        for part in (*own, self.embedding_head):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        tables = [self.queries, self.recalling.positions, self.meaning.positions]
        if isinstance(self.embedding_head, ReverseHead):
            tables.append(self.embedding_head.query)
        for table in tables:
            nn.init.normal_(table, std=0.02)

    def trained_parts(self) -> list[nn.Module | nn.Parameter]:
        """What the stage trains."""
        if self.stage == "contrastive":
            return [
                self.vision_norm,
                self.queries,
                self.qformer,
                self.vision_head,
                self.text_head,
                self.temperature,
            ]
        if self.stage == "detokenizer":
            assert self.detokenizer is not None
            return [self.detokenizer]
        codes = [self.to_code, self.quantizer, self.from_code, self.recalling]
        return [*codes, self.meaning, self.embedding_head]

    def train(self, mode: bool = True) -> Self:
        """What the stage does not train stays in eval mode."""
        super().train(False)
        self.training = mode
        for part in self.trained_parts():
            if isinstance(part, nn.Module):
                part.train(mode)
        return self

    @property
    def last_layer(self) -> Tensor:
        found = None if self.detokenizer is None else self.detokenizer.last_layer
        return self.from_code[2].weight if found is None else found  # type: ignore[return-value]

    def memory(self, seen: Tensor) -> Tensor:
        """What queries read, [B, S, M], of the vision model's tokens; always normed in float32."""
        with torch.autocast(seen.device.type, enabled=False):
            x = at_least_float32(seen)
            norm = self.vision_norm
            return F.layer_norm(
                x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps
            )

    def states(self, images: Tensor) -> Tensor:
        """Causal states [B, n, D] of images."""
        self.check_images(images)
        with torch.no_grad():
            seen = cast(Vision, self.vision).tokens(images)
        return self.states_of(self.memory(seen))

    def states_of(self, memory: Tensor, count: int | None = None) -> Tensor:
        """Causal states [B, n, D] of the first `count` queries (None: all)."""
        queries = self.queries[:, :count].expand(len(memory), -1, -1)
        return self.qformer(queries, memory.to(self.queries.dtype))

    def latents(self, images: Tensor) -> Tensor:
        return self.to_code(self.states(images))

    def embedding(self, vectors: Tensor) -> Tensor:
        """Embedding [B, E] of code vectors [B, n, C]: what a detokenizer draws from."""
        weight = cast(nn.Linear, self.from_code[0]).weight
        return self.embedding_head(self.meaning(self.from_code(vectors.to(weight.dtype))))

    def semantics(self, tokens: Tensor) -> Tensor:
        """As `embedding`, of tokens: [B, 1, E]."""
        return self.embedding(self.quantizer.decode(tokens))[:, None]

    def render(self, vectors: Tensor) -> Tensor:
        if self.detokenizer is None:
            raise UserError(
                "this SEED has no detokenizer, so that it gives no images: train one (stage "
                '"detokenizer"), or set `detokenizer` to UnCLIP of a local folder'
            )
        return at_least_float32(self.detokenizer(self.embedding(vectors)))

    def forward(self, images: Tensor) -> TokenizerOutput:
        if self.stage == "contrastive" and self.training:
            raise UserError('stage "contrastive" learns from captions, and this batch has none')
        if self.stage == "codebook" and self.training:
            target = None if self.teacher is None else embedding_of(self.teacher, images)
            return self.codebook_pass(self.states(images), target, images.shape[-2:])
        with torch.no_grad():
            latents = self.latents(images)
            tokens = self.quantizer.encode(latents)
            vectors = self.quantizer.decode(tokens)
            embedding = self.embedding(vectors)
        if self.detokenizer is None:
            raise UserError("this SEED has no detokenizer, so that it gives no images")
        return TokenizerOutput(at_least_float32(self.detokenizer(embedding)), tokens, {})

    def codebook_pass(
        self, states: Tensor, target: Tensor | None, size: Sequence[int]
    ) -> TokenizerOutput:
        """Losses of the codebook stage, of causal states [B, n, D] and embeddings [B, E] of a teacher
        (None: they are not learnt). It draws no image.
        """
        states = states.detach()
        quantized = self.quantizer(self.to_code(states))
        losses = dict(quantized.losses)
        recalled = self.recalling(self.from_code(quantized.quantized))
        losses["recall"] = self.loss_weights.reconstruct * cosine_distance(recalled, states).mean()
        if target is not None:
            found = at_least_float32(self.embedding(quantized.quantized))
            if found.shape != target.shape:
                raise UserError(
                    f"embedding_dim is {found.shape[1]}; the teacher's embeddings have {target.shape[1]}"
                )
            losses["distill"] = self.loss_weights.distill * F.mse_loss(found, target)
        return TokenizerOutput(nothing_drawn(states, size), quantized.tokens, losses)

    # --- the contrastive stage

    def prepare_captions(self, captions: Callable[[], list[str]]) -> None:
        """Told once before training how to get the captions of the training set."""
        if self.stage == "contrastive":
            self.captions.prepare(captions)

    def of_batch(self, batch: Mapping[str, Any]) -> TokenizerOutput:
        if self.stage != "contrastive" or not self.training:
            return super().of_batch(batch)
        if "caption" not in batch:
            raise UserError('stage "contrastive" learns from captions, and the data set gives none')
        condition = self.captions.of_texts(batch["caption"])
        assert condition.ids is not None and condition.valid is not None
        images = batch["image"]
        states = self.states(images)
        loss = self.contrastive_loss(states, *to_right(condition.ids, condition.valid))
        with torch.no_grad():
            tokens = self.quantizer.encode(self.to_code(states))
        drawn = nothing_drawn(images, images.shape[-2:])
        return TokenizerOutput(drawn, tokens, {"contrastive": loss})

    def image_feature(self, states: Tensor) -> Tensor:
        """Of the last query, [B, dim], of length 1."""
        return F.normalize(at_least_float32(self.vision_head(states[:, -1])), dim=-1)

    def text_feature(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Of the first token of texts [B, T], [B, dim], of length 1."""
        found = self.qformer(ids=ids, valid=valid)
        return F.normalize(at_least_float32(self.text_head(found[:, 0])), dim=-1)

    def contrastive_loss(self, states: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        """Which text is of which image, both ways, over the batches of all processes."""
        assert self.text is not None
        image = self.image_feature(states)
        text = self.text_feature(ids, valid)
        first = len(image) * distributed.rank()
        target = first + torch.arange(len(image), device=image.device)
        total = image.new_zeros(())
        for own, other in ((image, text), (text, image)):
            others = other
            if distributed.is_distributed():
                # Gradients flow into this process's own features alone, as in BLIP-2.
                others = distributed.gather_rows(other.detach())
            logits = own @ others.T / self.temperature
            total = total + F.cross_entropy(
                logits, target, label_smoothing=self.text.label_smoothing
            )
        return total / 2

    def starting_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Texts are left out behind the contrastive stage, and a detokenizer that is not here; where
        texts are new, their feed-forward starts as that of the queries (BLIP-2 copies the other way).
        """
        own = self.state_dict().keys()
        kept = {}
        for name in own:
            if ".of_texts." in name and name not in state:
                kept[name] = state[name.replace(".of_texts.", ".of_queries.")].clone()
        for name, tensor in state.items():
            of_texts = name.startswith(OF_CONTRASTIVE) or ".of_texts." in name
            if name in own or not (of_texts or name.startswith("detokenizer.")):
                kept[name] = tensor
        return kept


def nothing_drawn(like: Tensor, size: Sequence[int]) -> Tensor:
    """The reconstruction [B, 0, H, W] of a pass that draws no image."""
    return torch.zeros(len(like), 0, *size, device=like.device)


def to_right(ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Texts [B, T] padded on the left as texts padded on the right."""
    order = (~valid).to(torch.int64).argsort(dim=1, stable=True)
    return ids.gather(1, order), valid.gather(1, order)


def seed_2(
    detokenizer: Detokenizer | None = None,
    teacher: Teacher | None = None,
    text: TextSide | None = None,
    reverse: bool = False,
    stage: Stage = "codebook",
) -> SEED:
    """1,149,998,528 parameters without texts and detokenizer (1,248,743,104 with `reverse`), of which
    985,894,528 are EVA's; 32 tokens of 8,192 codes at 224 pixels.
    """
    return SEED(
        EvaVision(),
        detokenizer=detokenizer,
        teacher=teacher,
        text=text,
        reverse=reverse,
        stage=stage,
    )

"""Padded text: captions as ids of the generator's own vocabulary, always of one length (TokenFlow,
arXiv 2412.03069).

    PAD .. PAD  text  opening  | image        vocabulary: text 0 .. T - 1, PAD = T, codes

Padding is read by nobody, but it has places: a text stands at the same places before the image
whatever its length.
"""

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition, Conditioner, Conditioning, pad_left
from tessellar.text.conditioners import CaptionConditioner


class PaddedText(Conditioning, nn.Module):
    """Ids of a text of at most `text_length` tokens, padded on the left to that many, and the pieces
    `opening` of the mark that begins an image; no weights of its own.

    The null condition is the text `negative` (empty: the id `bos` alone), which guidance moves away
    from; what training takes in place of a dropped text is `bos` alone. Raises UserError for ids
    that are none.
    """

    def __init__(
        self,
        text_vocab: int,
        text_length: int,
        opening: tuple[int, ...] = (),
        closing: tuple[int, ...] = (),
        bos: int = 0,
        negative: tuple[int, ...] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dropout)
        outside = [i for i in (bos, *opening, *closing, *negative) if not 0 <= i < text_vocab]
        if outside:
            raise UserError(f"the id {outside[0]} is none of the {text_vocab} text ids")
        if len(negative) > text_length:
            raise UserError(
                f"the negative text has {len(negative)} ids, texts at most {text_length}"
            )
        self.text_vocab = text_vocab
        self.text_length = text_length
        self.opening = tuple(opening)
        self.closing = tuple(closing)
        self.bos = bos
        self.negative = tuple(negative) or (bos,)
        self.pad = text_vocab
        self.joint_vocab = text_vocab + 1
        self.length = text_length + len(opening)

    def tokens(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Ids [R, P] with the opening at the end, and which of them are no padding."""
        if condition.ids is None or condition.valid is None:
            raise UserError(
                "this generator reads captions as token ids: it needs a conditioner that gives ids and valid"
            )
        if condition.ids.shape[1] > self.text_length:
            raise UserError(
                f"captions have {condition.ids.shape[1]} ids; this model reads {self.text_length}"
            )
        valid = pad_left(condition.valid.bool(), self.text_length)
        ids = pad_left(condition.ids, self.text_length).clamp(0, self.text_vocab - 1)
        ids = torch.where(valid, ids, self.pad)
        opening = torch.tensor(self.opening, dtype=ids.dtype, device=ids.device)
        opening = opening.expand(len(ids), -1)
        return torch.cat([ids, opening], 1), torch.cat([valid, torch.ones_like(opening).bool()], 1)

    def conditioner(self) -> Conditioner:
        return CaptionConditioner(self.text_vocab, self.text_length)

    def null(self, condition: Condition) -> Condition:
        return text_of(self.negative, condition)

    def drop(self, condition: Condition) -> Condition:
        if self.dropout == 0:
            return condition
        keep = torch.rand(condition.batch) >= self.dropout
        assert condition.ids is not None
        empty = text_of((self.bos,), condition)
        return condition.where(keep.to(condition.ids.device), empty)


def text_of(ids: tuple[int, ...], like: Condition) -> Condition:
    """The text of `ids` for every row of another condition."""
    assert like.ids is not None
    rows = torch.tensor(ids, dtype=like.ids.dtype, device=like.ids.device).repeat(like.batch, 1)
    return Condition(ids=rows, valid=torch.ones_like(rows, dtype=torch.bool))

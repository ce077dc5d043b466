"""Joint text: captions as tokens of the generator's own sequence, [text, begin of image, windows,
end of image].

Text ids, the two marks and the image codes share one vocabulary (Token-Shuffle, arXiv 2504.17789;
Chameleon before it). The null prompt is the begin-of-text id alone: it is shorter, and padding
stands on the left.
"""

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition, Conditioner, Conditioning
from tessellar.text.conditioners import CaptionConditioner

IGNORED = -100
"""The target of what is not predicted, as `torch.nn.functional.cross_entropy` has it."""


class JointText(Conditioning, nn.Module):
    """Ids of a text and the mark behind it; no weights of its own. Texts have at most `length`
    tokens.
    """

    def __init__(self, text_vocab: int, length: int, bos: int = 0, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if not 0 <= bos < text_vocab:
            raise UserError(f"bos is {bos}; it must be one of the {text_vocab} text ids")
        self.text_vocab = text_vocab
        self.length = length
        self.bos = bos
        self.boi = text_vocab
        self.eoi = text_vocab + 1
        self.joint_vocab = text_vocab + 2

    def tokens(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Ids [R, T + 1] with the begin of the image at the end, and which of them are no padding."""
        if condition.ids is None or condition.valid is None:
            raise UserError(
                "this generator reads captions as token ids: it needs a conditioner that gives ids and valid"
            )
        ids = condition.ids
        valid = condition.valid.bool()
        mark = torch.full_like(ids[:, :1], self.boi)
        return torch.cat([ids.clamp(0, self.text_vocab - 1), mark], 1), torch.cat(
            [valid, valid.new_ones(len(ids), 1)], 1
        )

    def targets(self, condition: Condition) -> Tensor:
        """[R, T + 1]: what follows each text token, then the end of the image; IGNORED at padding."""
        ids, valid = self.tokens(condition)
        following = torch.where(valid[:, :-1], ids[:, 1:], IGNORED)
        return torch.cat([following, torch.full_like(ids[:, :1], self.eoi)], 1)

    def conditioner(self) -> Conditioner:
        return CaptionConditioner(self.text_vocab, self.length)

    def null(self, condition: Condition) -> Condition:
        assert condition.ids is not None
        ids = torch.full_like(condition.ids[:, :1], self.bos)
        return Condition(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool))

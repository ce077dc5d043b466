"""Editing for a set of images: image i by its own seed, under its own class or prompt."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tessellar.images import to_uint8
from tessellar.protocol.condition import Condition, Conditioner
from tessellar.protocol.configured import describe
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import Blend
from tessellar.protocol.noise import Noise
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.editing.edits import Edit, Material, Plan
from tessellar.sampling.editing.given import draw_given, in_units, order_around
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder
from tessellar.sampling.run import check_seed
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner


class EditableModel(Protocol):
    """What edits; `tessellar.pipeline.ImageGenerator` is one."""

    tokenizer: Tokenizer
    generator: Generator
    conditioner: Conditioner

    def class_condition(self, labels: Sequence[int]) -> Condition: ...

    def class_ids(self, classes: str) -> list[int]: ...

    def decode(self, tokens: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass
class Editing:
    """How a set is edited; pictures [3, H, W] in [-1, 1], the mask [H, W] is True where it is drawn anew."""

    edit: Edit
    sampling: Sampling
    seed: int = 0
    batch_size: int = 64
    precision: str = "float32"
    recorder: Recorder | None = None
    picture: Tensor | None = None
    other: Tensor | None = None
    mask: Tensor | None = None
    laws: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What the record of the samples says: the edit, and whether the law of the free tokens is exact."""
        return {"edit": {**describe(self.edit), **self.laws}}

    def finish(self) -> None:
        """Nothing is to be done when all images are written."""

    def batches(
        self,
        model: EditableModel,
        labels: Sequence[int],
        indices: Sequence[int],
        texts: Sequence[str] | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, uint8 images [b, 3, H, W]), class by class, or prompt by prompt."""
        check_seed(self.seed, max(indices, default=0) + 1)
        by_label: dict[int | str, list[int]] = {}
        for index in indices:
            by_label.setdefault(labels[index] if texts is None else texts[index], []).append(index)
        for label, members in by_label.items():
            condition = condition_of(model, label)
            plan = self.planned(model, condition)
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                yield chosen, self.made(model, condition, plan, chosen)

    def planned(self, model: EditableModel, condition: Condition) -> Plan:
        """The plan for a condition of one row; what it does is noted for the record."""
        mode = model.generator.training
        model.generator.eval()
        try:
            plan = self.edit.plan(
                Material(
                    model.tokenizer,
                    model.generator,
                    condition,
                    picture=self.picture,
                    other=self.other,
                    mask=self.mask,
                )
            )
        finally:
            model.generator.train(mode)
        kept = in_units(model.generator, plan.kept)
        law = "nothing is drawn"
        if plan.draws:
            order = order_around(model.generator, kept, Noise([self.seed]))
            law = "exact" if order.exact else "approximate"
        self.laws = {"kept_tokens": int(kept.sum()), "tokens": len(kept), "law": law}
        return plan

    @torch.no_grad()
    def made(
        self, model: EditableModel, condition: Condition, plan: Plan, chosen: list[int]
    ) -> Tensor:
        """uint8 images of some members of a class, on the CPU."""
        tokens = plan.tokens[None].expand(len(chosen), *plan.tokens.shape)
        if plan.draws:
            tokens = self.drawn(model, condition, plan, chosen, tokens)
        images = model.decode(tokens)
        if plan.pasted is not None:
            picture, mask = (part.to(images.device) for part in plan.pasted)
            images = torch.where(mask, images, picture)
        return to_uint8(images).cpu()

    def drawn(
        self,
        model: EditableModel,
        condition: Condition,
        plan: Plan,
        chosen: list[int],
        tokens: Tensor,
    ) -> Tensor:
        device = next(model.parameters()).device
        rows = torch.zeros(len(chosen), dtype=torch.int64, device=device)
        blend = None
        if plan.other_class:
            other = other_condition(model, plan.other_class).to(device)
            blend = Blend(other.select(rows), plan.share)
        rounding: AbstractContextManager = nullcontext()
        if self.precision == "bf16":
            rounding = torch.autocast(device.type, torch.bfloat16)
        mode = model.generator.training
        model.generator.eval()
        try:
            with rounding, prepared(model.generator):
                return draw_given(
                    model.generator,
                    condition.to(device).select(rows),
                    self.sampling,
                    seeds=[self.seed + index for index in chosen],
                    tokens=tokens,
                    kept=in_units(model.generator, plan.kept),
                    particles=plan.particles,
                    blend=blend,
                    recorder=self.recorder,
                )
        finally:
            model.generator.train(mode)


def condition_of(model: EditableModel, label: int | str) -> Condition:
    """Of one class, or of one prompt."""
    if isinstance(label, int):
        return model.class_condition([label])
    assert isinstance(model.conditioner, TextConditioner)
    return model.conditioner.of_texts([label])


def other_condition(model: EditableModel, text: str) -> Condition:
    """Of a class by name or id, or of a prompt where the generator reads text."""
    if isinstance(model.conditioner, TextConditioner):
        return model.conditioner.of_texts([text])
    return model.class_condition(model.class_ids(text)[:1])

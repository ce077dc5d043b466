"""What training a generator and aligning one have in common: a frozen tokenizer's tokens, an export
of all parts, validation by the likelihood of real images.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.text.conditioners import TextConditioner
from tessellar.training.base import TrainingModule
from tessellar.training.facts import Facts


class ImageGeneratorModule(TrainingModule):
    """Of a `model`: a tokenizer, a generator and its conditioner.

    A batch brings `tokens` (from a cache) or `image`, which the tokenizer encodes in float32.
    """

    model: ImageGenerator

    @property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        return self.model.tokenizer

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.model.class_names

    @property
    def ema_target(self) -> nn.Module:
        return self.model.generator

    @property
    def reads_labels(self) -> bool:  # type: ignore[override]
        return isinstance(self.model.conditioner, ClassConditioner)

    def parts(self) -> dict[str, nn.Module | None]:
        model = self.model
        return {
            "tokenizer": model.tokenizer,
            "generator": model.generator,
            "conditioner": model.conditioner,
        }

    def facts(self) -> Facts:
        """With the work of the generator."""
        generator = self.model.generator
        work = generator.work()
        facts = super().facts()
        return facts._replace(
            entities=generator.entities.count, positions=work.positions, flops=work.training_flops
        )

    def hint_of_classes(self, count: int) -> str:
        """What to set where the data has `count` classes and the generator another number."""
        return ""

    def check_data(self, data: ImageDataModule) -> None:
        conditioner = self.model.conditioner
        if isinstance(conditioner, TextConditioner):
            data.check_captions()
        wanted = getattr(conditioner, "num_classes", None)
        if wanted is not None and wanted != data.num_classes:
            raise UserError(
                f"the generator has {wanted} classes; the data set {data.name} has {data.num_classes}"
                f"{self.hint_of_classes(data.num_classes)}"
            )
        super().check_data(data)

    @torch.no_grad()
    def tokens_of(self, batch: dict[str, Any]) -> Tensor:
        """Tokens of a batch, encoded (or made of those of a cache) in float32 whatever the
        precision of training; drawn anew where that is random.
        """
        with torch.autocast(self.device.type, enabled=False):
            if "tokens" in batch:
                tokens: Tensor = batch["tokens"]
                # Vectors of a cache may be another tokenizer's, which this one quantises.
                is_vectors = tokens.is_floating_point()
                return self.model.tokenizer.from_source(tokens) if is_vectors else tokens
            encode = self.model.tokenizer.draw if self.training else self.model.tokenizer.encode
            return encode(batch["image"].float())

    def validation_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        tokens = self.tokens_of(batch)
        terms, nats = self.model.generator.evaluate(tokens, self.model.conditioner(batch))
        named = {"loss": torch.stack(list(terms.values())).sum(), **terms}
        if nats is not None:
            named["nats_per_image"] = nats.mean()
        self.log_terms("val", named, len(tokens))
        return {"tokens": tokens}

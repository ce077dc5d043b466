"""Joint training: a tokenizer and the generator of its tokens in one run, end to end (EOSTok, arXiv
2605.00503).

L = L_tokenizer + CE + lam2 * likeness(decoder(p^ codes), image), where CE's gradient reaches the encoder,
lam1 times, through the generator's soft inputs (methods/joint.py). Targets of CE are hard: no gradient.

There is no official code. Inferred, not said by the paper: both weights (lam1 0.1, lam2 1 as a start),
their warm-up (`likelihood.start`, after the codebook is in use; predictions are near the unigram at
first and would pull the decoder to grey), the softmax's temperature, and that the generator is
trained by CE with weight 1 whatever lam1 is. Chosen by us: the decoder draws z_q and p^ codes in two
passes instead of one batch of 2 B. Alignment with a vision model is the tokenizer's own, where it has
one; there is no further term for it here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tessellar.checkpoints.description import WHOLE
from tessellar.checkpoints.reading import init_tokenizer
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.models.parts.prefix_transformer import generated
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.condition import Condition, Conditioner
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.schedules import Schedule
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.training.alignment.method import ungenerated
from tessellar.training.base import Player, trainable
from tessellar.training.generator_module import ImageGeneratorModule
from tessellar.training.methods.joint import (
    Ramp,
    Watched,
    assignment,
    expected_vectors,
    require_joint,
    soft_inputs,
)
from tessellar.training.optim import OptimizerSettings
from tessellar.training.speed import checkpoint_activations, compile_each_block
from tessellar.training.tokenizer_module import discriminator_player, psnr


class TrainedTogether(ImageGenerator):
    """An image generator whose tokenizer is trained too."""

    def __init__(
        self, tokenizer: Tokenizer, generator: Generator, conditioner: Conditioner
    ) -> None:
        trained = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
        super().__init__(tokenizer, generator, conditioner)
        for parameter in trained:
            parameter.requires_grad_(True)
        # It was frozen: a quantizer in evaluation passes no gradient to its encoder.
        self.train()

    def train(self, mode: bool = True) -> "TrainedTogether":
        """All parts are in the same mode."""
        nn.Module.train(self, mode)
        return self


@in_ranges
class JointModule(ImageGeneratorModule):
    """Train `tokenizer` with `loss` and, on its tokens of the moment, a generator; one run, one export.

    `likelihood` weighs what of the generator's cross-entropy reaches the encoder (weight 0: nothing,
    its input is then a constant), `prediction` the images of its teacher-forced predictions; without
    `prediction_trains_generator` those reach the decoder and the codes alone. `temperature` is that of
    the soft assignment: of a normalised codebook about 0.07, else its gradient is nearly uniform.
    `nested_dropout`: predictions are decoded from a random prefix, for tokenizers of ordered tokens.
    Tokenizer, generator and discriminator have an optimizer and a schedule each (None: the
    tokenizer's); `clip` is of each on its own. Averages are kept of tokenizer and generator together.
    `init_from` starts the tokenizer from an export or checkpoint.

    Raises UserError where no gradient can pass between the two.
    """

    # The likelihood falls as codes die: it chooses no checkpoint.
    best_by = ("val/predicted_psnr", "max")
    least_codes_used = 0.5

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Callable[[Layout], Generator],
        loss: TokenizerLoss,
        conditioner: Conditioner | None = None,
        likelihood: Ramp = Ramp(0.1),  # noqa: B008
        prediction: Ramp = Ramp(1.0),  # noqa: B008
        prediction_trains_generator: bool = True,
        temperature: float = 1.0,
        nested_dropout: bool = False,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        generator_optimizer: OptimizerSettings | None = None,
        generator_schedule: Schedule | None = None,
        discriminator_optimizer: OptimizerSettings | None = None,
        discriminator_schedule: Schedule | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        max_skipped: int = 10,
        checkpointing: bool = False,
        compile_blocks: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__(clip, accumulate, max_skipped)
        made = generator(tokenizer.layout)
        quantized, teacher_forced = require_joint(tokenizer, made)
        if nested_dropout and tokenizer.layout.min_prefix is None:
            raise UserError(
                f"nested_dropout decodes prefixes, which {type(tokenizer).__name__} cannot: take One-D-Piece"
            )
        for settings, part in ((optimizer, tokenizer), (generator_optimizer or optimizer, made)):
            if settings.transfer is not None:
                settings.transfer.start(part)
        if init_from is not None:
            init_tokenizer(init_from, tokenizer, loss.discriminator)
        self.model = TrainedTogether(tokenizer, made, conditioner or made.make_conditioner())
        tokenizer.looks_at_range = False
        self.quantized = [quantized]  # in a list, so that neither is a part of the module twice
        self.teacher_forced = [teacher_forced]
        self.watched = Watched(quantized)
        self.loss = loss
        self.likelihood = likelihood
        self.prediction = prediction
        self.prediction_trains_generator = prediction_trains_generator
        self.temperature = temperature
        self.nested_dropout = nested_dropout
        self.optimizer_settings = optimizer
        self.schedule = schedule
        self.generator_settings = generator_optimizer or optimizer
        self.generator_schedule = generator_schedule or schedule
        self.discriminator_settings = discriminator_optimizer or optimizer
        self.discriminator_schedule = discriminator_schedule
        if checkpointing:
            checkpoint_activations(made)
        if compile_blocks:
            compile_each_block(tokenizer)
            compile_each_block(made)

    @property
    def ema_target(self) -> nn.Module:
        return self.model

    @property
    def averaged(self) -> str:  # type: ignore[override]
        return WHOLE

    @property
    def takes_turns(self) -> bool:  # type: ignore[override]
        return self.loss.discriminator is not None

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, ImageDataModule):
            self.learn_conditions(data)

    def make_players(self) -> list[Player]:
        tokenizer = self.tokenizer
        optimizers = self.optimizer_settings.make(tokenizer)
        players = [
            Player("tokenizer", [tokenizer], trainable(tokenizer), optimizers, self.schedule)
        ]
        modules = [self.model.generator, self.model.conditioner]
        optimizers = self.generator_settings.make(*modules)
        players.append(
            Player("generator", modules, trainable(*modules), optimizers, self.generator_schedule)
        )
        if self.loss.discriminator is not None:
            players.append(
                discriminator_player(
                    self.loss,
                    self.discriminator_settings,
                    shared=self.schedule,
                    own=self.discriminator_schedule,
                )
            )
        return players

    def hint_of_classes(self, count: int) -> str:
        return f": set --model.generator.num_classes {count}"

    def predicted_images(
        self, scores: Logits, entities: Entities, prefix: int | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] of teacher-forced predictions: of the mean code vector of each token,
        of the first `prefix` of them.
        """
        probs = ungenerated(scores.logits.float().softmax(-1), entities)
        return self.quantized[0].render(expected_vectors(self.quantized[0], probs)[:, :prefix])

    def scores(
        self,
        tokens: Tensor,
        condition: Condition,
        entities: Entities,
        p: Tensor | None = None,
        weight: float = 0.0,
    ) -> Logits:
        """Teacher-forced scores of tokens [B, N], in the order of `entities`; through `weight` times
        the soft assignment p [B, N, V] gradients reach whatever made it.
        """
        generator = self.teacher_forced[0]
        if p is None:
            found = generator.score(tokens, condition, entities)
        else:
            with soft_inputs(generator, p, weight):
                found = generator.score(tokens, condition, entities)
        if not isinstance(found, Logits):
            raise UserError(
                "joint training needs one softmax over the codes; "
                f"{type(generator).__name__} gives {type(found).__name__}"
            )
        return found

    def generator_terms(
        self, images: Tensor, tokens: Tensor, z: Tensor, condition: Condition
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses of a batch that generator and tokenizer share, and what else is logged."""
        generator = self.teacher_forced[0]
        weight = self.likelihood.at(self.updates)
        p = None
        logged = {}
        if weight:
            p = assignment(self.quantized[0], z, self.temperature)
            entropy = torch.special.entr(p.detach()).sum(-1).mean()
            logged["assignment_entropy"] = entropy
        entities = generator.training_order(len(tokens))
        condition = generator.drop_condition(condition)
        scores = self.scores(tokens, condition, entities, p, weight)
        targets = generated(tokens, entities)
        losses = generator.losses_of(scores, targets)
        logged["accuracy"] = (scores.logits.argmax(-1) == targets).float().mean()
        weight = self.prediction.at(self.updates)
        if weight:
            if not self.prediction_trains_generator:
                scores = Logits(scores.logits.detach())
            drawn = self.predicted_images(scores, entities, self.drawn_prefix())
            likeness, terms = self.loss.likeness(images, drawn)
            losses["prediction"] = weight * likeness
            for name, value in terms.items():
                logged[f"predicted_{name}"] = value
        return losses, logged

    def drawn_prefix(self) -> int | None:
        """How many tokens this pass's predictions are decoded from; None: all."""
        if not self.nested_dropout:
            return None
        layout = self.tokenizer.layout
        assert layout.min_prefix is not None
        return int(torch.randint(layout.min_prefix, layout.length + 1, ()))

    def training_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        images = self.images_of(batch)
        output = self.tokenizer.of_batch(batch)
        terms = self.loss.generator_loss(images, output, self.updates, self.tokenizer.last_layer)
        condition = self.model.conditioner(batch)
        losses, logged = self.generator_terms(
            images, output.tokens, self.watched.taken(), condition=condition
        )
        total = terms.total + torch.stack(list(losses.values())).sum()
        self.add_gradient(total)
        for player in self.players[:2]:
            self.step(player)
        self.log_terms("train", {"loss": total, **terms.terms, **losses, **logged}, len(images))
        if self.loss.adversarial_active(self.updates):
            fake = output.reconstruction.detach()
            against = self.loss.discriminator_loss(images, fake, self.updates)
            self.backward_and_step(self.players[2], against.total)
            self.log_terms("train", against.terms, len(images))
        self.finish_batch(len(images))
        return {"loss": total.detach(), "tokens": output.tokens}

    def images_of(self, batch: dict[str, Any]) -> Tensor:
        """The images of a batch; raises UserError for a cache of tokens, which are another tokenizer's."""
        if "image" not in batch:
            raise UserError(
                "joint training reads images: its tokens change, a cache cannot hold them"
            )
        return batch["image"]

    def validation_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        images = self.images_of(batch)
        tokens = self.tokenizer.encode(images)
        generator = self.teacher_forced[0]
        entities = generator.entities
        scores = self.scores(tokens, self.model.conditioner(batch), entities)
        targets = generated(tokens, entities)
        terms = generator.losses_of(scores, targets)
        nats = scores.nats(targets)
        named = {"loss": torch.stack(list(terms.values())).sum(), **terms}
        if nats is not None:
            named["nats_per_image"] = nats.mean()
        named["accuracy"] = (scores.logits.argmax(-1) == targets).float().mean()
        named["psnr"] = psnr(self.tokenizer.decode(tokens), images)
        named["predicted_psnr"] = psnr(self.predicted_images(scores, entities), images)
        self.log_terms("val", named, len(images))
        return {"tokens": tokens}

"""Generator training: any generator on the tokens of a frozen tokenizer."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tessellar.checkpoints.data_facts import other_class
from tessellar.checkpoints.description import PREFIXES
from tessellar.checkpoints.fitting import place_classes
from tessellar.checkpoints.reading import Start, init_generator, load_tokenizer, read_source
from tessellar.data.batch import normalised
from tessellar.data.classes import shown
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.models.parts.llama import LlamaGenerator
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.condition import ClassConditioner, Condition, Conditioner
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.schedules import Schedule
from tessellar.text.conditioners import TextConditioner
from tessellar.training.base import Player, TrainingModule, trainable
from tessellar.training.facts import Facts
from tessellar.training.methods.context_noise import ContextNoise, reading, require_teacher_forcing
from tessellar.training.methods.mixture import Mixture, MixtureObjective
from tessellar.training.methods.order_annealing import OrderAnnealing
from tessellar.training.methods.recovery import EmbeddingRecovery, Recovery, Trace
from tessellar.training.optim import OptimizerSettings
from tessellar.training.sharding import shard, split_matrices
from tessellar.training.speed import (
    checkpoint_activations,
    chunk_the_loss,
    compile_each_block,
    compile_layers_together,
)
from tessellar.training.training_captions import training_captions

log = logging.getLogger(__name__)


class ImageGeneratorModule(TrainingModule):
    """What training a generator and aligning one have in common: a `model` of a frozen tokenizer, a
    generator and its conditioner, of which an export holds all parts, validated by the likelihood of
    real images.

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

    def take_size(self, image_size: tuple[int, int]) -> None:
        self.model.take_size(image_size)

    def parts(self) -> dict[str, nn.Module | None]:
        model = self.model
        return {
            "tokenizer": model.tokenizer,
            "generator": model.generator,
            "conditioner": model.conditioner,
        }

    def frozen_parts(self) -> dict[str, nn.Module]:
        tokenizer = self.model.tokenizer
        return {} if trainable(tokenizer) else {PREFIXES["generator"]["tokenizer"]: tokenizer}

    def facts(self) -> Facts:
        """With the work of the generator."""
        generator = self.model.generator
        work = generator.work()
        facts = super().facts()
        return facts._replace(
            entities=generator.entities.count, positions=work.positions, flops=work.training_flops
        )

    def learn_conditions(self, data: ImageDataModule) -> None:
        """Captions for a conditioner that learns from them, names of classes for one that reads those."""
        conditioner = self.model.conditioner
        if isinstance(conditioner, TextConditioner):
            conditioner.prepare(lambda: training_captions(data.text_datasets()[0]))
        if isinstance(conditioner, ClassConditioner):
            self.model.class_names = tuple(data.class_names)

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
                # A cache holds those of `source`, which this tokenizer quantises or regroups.
                tokenizer = self.model.tokenizer
                return tokenizer.from_source(tokens) if tokenizer.is_derived else tokens
            encode = self.model.tokenizer.draw if self.training else self.model.tokenizer.encode
            return encode(normalised(batch)["image"].float())

    def validation_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        tokens = self.tokens_of(batch)
        terms, nats = self.model.generator.evaluate(tokens, self.model.conditioner(batch))
        named = {"loss": torch.stack(list(terms.values())).sum(), **terms}
        if nats is not None:
            named["nats_per_image"] = nats.mean()
        self.log_terms("val", named, len(tokens))
        return {"tokens": tokens}


@in_ranges
class GeneratorModule(ImageGeneratorModule):
    """Train a generator, built from the layout of `tokenizer` (a tokenizer, or the path of one).

    Its conditioner is the generator's own choice unless one is given.

    A batch brings `tokens` (from a cache) or `image`, which the tokenizer encodes in float32.
    `checkpointing` trades compute for memory (`selective`: what costs little is computed again),
    `compile_blocks` compiles each block on its own, `compile_model` all layers as one graph,
    `chunked_loss` holds no table of logits where there are 32,768 codes or more.
    `init_from` starts from the generator and the conditioner of an export or checkpoint, whose
    classes are found by their names; `init_fresh` names tensors or modules that stay as they were
    made. A generator trained by teacher forcing may read a noisy context (`context_noise`) and also learn
    code vectors (`recovery`), in training alone; together: reAR. `mixture` trains it on random-token
    and next-all-token prediction too (TokenUnify). A drafter learns from the generator at `target`, an
    export or checkpoint that stays as it is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        generator: Callable[[Layout], Generator],
        conditioner: Conditioner | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        clip: float | None = 1.0,
        accumulate: int = 1,
        max_skipped: int = 10,
        checkpointing: bool | Literal["selective"] = False,
        compile_blocks: bool = False,
        compile_model: bool = False,
        chunked_loss: bool = False,
        init_from: str | None = None,
        init_fresh: Sequence[str] = (),
        context_noise: ContextNoise | None = None,
        recovery: Recovery | None = None,
        mixture: Mixture | None = None,
        target: str | None = None,
    ) -> None:
        super().__init__(clip, accumulate, max_skipped)
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        made = generator(loaded.layout)
        self.model = ImageGenerator(loaded, made, conditioner or made.make_conditioner())
        loaded.looks_at_range = False
        self.optimizer_settings = optimizer
        self.schedule = schedule
        self.target = target
        self.context_noise = context_noise
        self.recovery = None if recovery is None else EmbeddingRecovery(recovery, made, loaded)
        if mixture is not None and (context_noise or recovery):
            raise UserError(
                "mixture reads tokens in its own way: leave context_noise and recovery out"
            )
        self.mixture = None if mixture is None else MixtureObjective(mixture, made)
        if context_noise is not None:
            require_teacher_forcing(made, "context_noise")
        if optimizer.transfer is not None:
            optimizer.transfer.start(made)
        self.init_from = init_from
        self.start: Start | None = None
        if init_from is not None:
            self.start = init_generator(
                init_from, made, self.model.conditioner, loaded, fresh=init_fresh
            )
        if checkpointing:
            checkpoint_activations(made, selective=checkpointing == "selective")
        if compile_blocks and compile_model:
            raise UserError(
                "compile_blocks compiles layer by layer, compile_model all of them: choose one"
            )
        if compile_model:
            compile_layers_together(made)
        if compile_blocks:
            compile_each_block(made)
        if chunked_loss:
            chunk_the_loss(made)

    def setup(self, stage: str) -> None:
        """A conditioner that learns from captions reads those of the training set, unless it came with `init_from`; a
        checkpoint's replaces it later."""
        if self.target is not None:
            self.model.generator.learn_from(self._frozen(self.target))
        data = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not isinstance(data, ImageDataModule):
            return
        self.learn_conditions(data)
        if self.reads_labels and self.start is not None:
            self._place_classes(self.start, tuple(data.class_names))
            self.start = None

    def _frozen(self, path: str) -> Generator:
        """The generator at `path`, which nothing trains."""
        source = read_source(path)
        if source.kind != "generator":
            raise UserError(f"target {path} is a tokenizer; it must be a generator")
        generator: Generator = source.build("generator")
        generator.bind(self.model.tokenizer)
        return generator.eval().requires_grad_(False)

    def _place_classes(self, start: Start, now: tuple[str, ...]) -> None:
        """Give classes that the source knows by name their rows, and say which are new."""
        then = start.class_names
        if not then and start.num_classes == len(now):
            return  # nothing is known of them: rows are taken by number
        difference = other_class(then, now)
        if difference is None:
            return
        new = place_classes(self.model.generator, start.tables, then, now)
        if self.global_rank > 0:
            return
        if not then:
            log.warning(
                "%s does not name its %s classes: all %d of this run are new",
                self.init_from,
                start.num_classes,
                len(now),
            )
        else:
            kept = [name for name in now if name not in new]
            told = [f"{len(kept)} known by name ({shown(kept)})"] if kept and start.tables else []
            told += [f"{len(new)} new ({shown(new)})"] if new else []
            log.warning(
                "%s was trained on other classes: %s; this run's: %s",
                self.init_from,
                difference,
                ", ".join(told),
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        share = getattr(self.model.generator, "random_order", None) or 0.0
        anneals = any(isinstance(callback, OrderAnnealing) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if share > 0 and not anneals and self.global_rank == 0:
            log.warning(
                "%s trains on random orders in %.0f %% of its samples to the end, and is sampled in one fixed order: "
                "RAR's recipe anneals them, by the callback tessellar.training.methods.order_annealing.OrderAnnealing",
                type(self.model.generator).__name__,
                100 * share,
            )

    def hint_of_classes(self, count: int) -> str:
        return f": set --model.generator.num_classes {count}"

    def make_players(self) -> list[Player]:
        parts = (self.model.generator, self.model.conditioner, self.recovery, self.mixture)
        modules: list[nn.Module] = [part for part in parts if part is not None]
        optimizers = self.optimizer_settings.make(*modules)
        return [Player("generator", modules, trainable(*modules), optimizers, self.schedule)]

    def shard_over(self, mesh: DeviceMesh) -> None:
        shard(self.model.generator, mesh, methods=("loss",))
        if any(True for _ in self.model.conditioner.parameters()):
            shard(self.model.conditioner, mesh)

    def split_over(self, mesh: DeviceMesh) -> None:
        generator = self.model.generator
        if not isinstance(generator, LlamaGenerator):
            super().split_over(mesh)
        split_matrices(generator, mesh)  # type: ignore[arg-type]

    def regularised_losses(self, tokens: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Losses under a noisy context, and that of the recovery of code vectors."""
        generator = self.model.generator
        recovery = self.recovery
        assert isinstance(generator, PrefixTransformer)
        with nullcontext(Trace()) if recovery is None else recovery.watch(generator) as trace:

            def read(tokens: Tensor, entities: Entities) -> Tensor:
                trace.entities = entities
                if self.context_noise is None:
                    return tokens
                return self.context_noise.corrupt(
                    tokens, generator.layout, self.updates / self.total_updates
                )

            with reading(generator, read):
                terms = generator.loss(tokens, condition)
        if recovery is not None:
            terms = {**terms, "recovery": recovery(trace, generator, tokens, self.tokenizer)}
        return terms

    def training_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        tokens = self.tokens_of(batch)
        condition = self.model.conditioner(batch)
        if self.mixture is not None:
            generator = self.model.generator
            assert isinstance(generator, PrefixTransformer)
            progress = self.updates / self.total_updates
            terms = self.mixture(generator, tokens, condition, self.epoch, progress)
        elif self.context_noise is None and self.recovery is None:
            terms = self.model.generator.loss(tokens, condition)
        else:
            terms = self.regularised_losses(tokens, condition)
        total = torch.stack(list(terms.values())).sum()
        self.backward_and_step(self.players[0], total)
        self.log_terms("train", {"loss": total, **terms}, len(tokens))
        self.finish_batch(len(tokens))
        return {"loss": total.detach(), "tokens": tokens}

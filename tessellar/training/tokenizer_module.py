"""Tokenizer training: reconstruction, perceptual, adversarial and auxiliary losses of any
tokenizer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tessellar.checkpoints.reading import init_tokenizer
from tessellar.data.batch import normalised
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.schedules import Schedule
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.training.base import Player, TrainingModule, trainable
from tessellar.training.methods.generated_tokens import Drawer, RollOut, decoder_parameters
from tessellar.training.methods.latent_corruption import Disturbance, LatentCorruption
from tessellar.training.optim import OptimizerSettings
from tessellar.training.sharding import shard
from tessellar.training.speed import compile_each_block
from tessellar.training.training_captions import training_captions


@in_ranges
class TokenizerModule(TrainingModule):
    """Train `tokenizer` with `loss`.

    `discriminator_schedule` runs on the discriminator's own clock, from the loss's start to the end
    of the run, as TiTok's and ResTok's; None: the tokenizer's schedule, on the run's clock, as
    LlamaGen's. `init_from` starts from the weights of an export or checkpoint; where that has no
    discriminator a fresh one is used. `init_fresh` names tensors or modules of the tokenizer that
    stay as they were made. `discriminator_first`: the discriminator is updated before the tokenizer,
    as IBQ's.

    For the sake of a generator: `corruptions` disturb latents on their way to the decoder, in
    training alone (l-DeTok, RobustTok). `decoder_only` trains what images depend on when tokens are
    decoded; encoder and codes stay, their losses are left out. `generated_by` is a generator (an
    export, a checkpoint or a hub id) whose tokens, drawn by `roll_out`, the decoder alone learns to
    show as the images of the data; the run starts from its tokenizer.
    """

    best_by = ("val/psnr", "max")
    least_codes_used = 0.1

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: TokenizerLoss,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        discriminator_optimizer: OptimizerSettings | None = None,
        discriminator_schedule: Schedule | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        max_skipped: int = 10,
        compile_blocks: bool = False,
        init_from: str | None = None,
        init_fresh: Sequence[str] = (),
        discriminator_first: bool = False,
        corruptions: Sequence[LatentCorruption] = (),
        decoder_only: bool = False,
        generated_by: str | None = None,
        roll_out: RollOut = RollOut(),  # noqa: B008
    ) -> None:
        super().__init__(clip, accumulate, max_skipped)
        self.tokenizer = tokenizer
        self.tokenizer.looks_at_range = False
        self.loss = loss
        self.optimizer_settings = optimizer
        self.schedule = schedule
        self.discriminator_settings = discriminator_optimizer or optimizer
        self.discriminator_schedule = discriminator_schedule
        self.discriminator_first = discriminator_first
        if optimizer.transfer is not None:
            optimizer.transfer.start(tokenizer)
        if init_from is not None:
            init_tokenizer(init_from, tokenizer, loss.discriminator, fresh=init_fresh)
        self.decoder_only = decoder_only or generated_by is not None
        self.generated_by = generated_by
        self.roll_out = roll_out
        self.drawer: Drawer | None = None
        self.disturbance = Disturbance(corruptions, tokenizer) if corruptions else None
        if self.decoder_only:
            if init_from is None:
                raise UserError(
                    "a decoder is trained alone on the tokens of a trained encoder: say which, by init_from"
                )
            if corruptions:
                raise UserError(
                    "corruptions teach encoder and decoder together: leave them out where the decoder "
                    "alone is trained"
                )
            decoder = decoder_parameters(tokenizer)
            tokenizer.requires_grad_(False)
            for parameter in decoder:
                parameter.requires_grad_(True)
        if compile_blocks:
            compile_each_block(tokenizer)

    @property
    def ema_target(self) -> nn.Module:
        return self.tokenizer

    @property
    def discriminator(self) -> nn.Module | None:
        return self.loss.discriminator

    @property
    def takes_turns(self) -> bool:  # type: ignore[override]
        return self.discriminator is not None

    def parts(self) -> dict[str, nn.Module | None]:
        return {"tokenizer": self.tokenizer, "discriminator": self.discriminator}

    def make_players(self) -> list[Player]:
        optimizers = self.optimizer_settings.make(self.tokenizer)
        players = [
            Player(
                "tokenizer", [self.tokenizer], trainable(self.tokenizer), optimizers, self.schedule
            )
        ]
        if self.discriminator is not None:
            players.append(
                discriminator_player(
                    self.loss,
                    self.discriminator_settings,
                    shared=self.schedule,
                    own=self.discriminator_schedule,
                )
            )
        return players

    def setup(self, stage: str) -> None:
        """A tokenizer that learns from captions is told how to get those of the training set; the
        generator whose tokens are shown is loaded.
        """
        if stage == "fit" and self.generated_by is not None:
            self.drawer = Drawer(self.generated_by, self.roll_out, self.tokenizer)
        data = getattr(self.trainer, "datamodule", None)
        prepare = getattr(self.tokenizer, "prepare_captions", None)
        if stage == "fit" and prepare is not None and isinstance(data, ImageDataModule):
            prepare(lambda: training_captions(data.text_datasets()[0]))

    def shard_over(self, mesh: DeviceMesh) -> None:
        """The quantizer stays whole, since it writes its codes itself; so does the discriminator,
        which is small.
        """
        shard(self.tokenizer, mesh, whole=getattr(self.tokenizer, "quantizer", None))

    def training_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        batch = normalised(batch)  # of a loader without its data module
        images = batch["image"]
        output = self.reconstructed(batch)
        if self.discriminator_first:
            self._discriminate(images, output.reconstruction)
        terms = self.loss.generator_loss(images, output, self.updates, self.tokenizer.last_layer)
        self.backward_and_step(self.players[0], terms.total)
        self.log_terms("train", {"loss": terms.total, **terms.terms}, len(images))
        if not self.discriminator_first:
            self._discriminate(images, output.reconstruction)
        self.finish_batch(len(images))
        return {"loss": terms.total.detach(), "tokens": output.tokens}

    def reconstructed(self, batch: dict[str, Any]) -> TokenizerOutput:
        """The training pass of a batch; where the decoder alone is trained, what it makes of tokens."""
        if not self.decoder_only:
            if self.disturbance is not None:
                self.disturbance.progress = self.updates / self.total_updates
            return self.tokenizer.of_batch(batch)
        was_training = self.tokenizer.training
        self.tokenizer.eval()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            tokens = self.tokenizer.encode(batch["image"].float())
        self.tokenizer.train(was_training)
        if self.drawer is not None:
            tokens = self.drawer.tokens(tokens, batch)
        return TokenizerOutput(self.tokenizer.decode(tokens), tokens, {})

    def _discriminate(self, images: Tensor, reconstruction: Tensor) -> None:
        """The discriminator's update, once it has begun."""
        if self.discriminator is None or not self.loss.adversarial_active(self.updates):
            return
        against = self.loss.discriminator_loss(images, reconstruction.detach(), self.updates)
        self.backward_and_step(self.players[1], against.total)
        self.log_terms("train", against.terms, len(images))

    def validation_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        images = normalised(batch)["image"]
        tokens = self.tokenizer.encode(images)
        reconstruction = self.tokenizer.decode(tokens)
        distance = (reconstruction.float().clamp(-1, 1) - images).abs().mean()
        named = {"psnr": psnr(reconstruction, images), "l1": distance}
        self.log_terms("val", named, len(images))
        return {"tokens": tokens, "reconstruction": reconstruction}


def psnr(drawn: Tensor, images: Tensor) -> Tensor:
    """Mean PSNR in dB of drawn images [B, 3, H, W], clamped to [-1, 1]."""
    error = (drawn.float().clamp(-1, 1) - images) / 2
    return -10 * error.square().flatten(1).mean(1).clamp(min=1e-10).log10().mean()


def discriminator_player(
    loss: TokenizerLoss, settings: OptimizerSettings, shared: Schedule, own: Schedule | None
) -> Player:
    """The discriminator of `loss`: by its `own` schedule from the loss's start on, else by the
    `shared` one on the run's clock.
    """
    assert loss.discriminator is not None
    modules = [part for part in (loss.discriminator, loss.lecam) if part is not None]
    optimizers = settings.make(loss.discriminator)
    start = 0 if own is None else loss.adversarial_start
    parameters = trainable(*modules)
    return Player("discriminator", modules, parameters, optimizers, own or shared, start)

"""A third kind of training module says itself what it is: nothing else asks which one it is."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tessellar
from tessellar.checkpoints.card import Record
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.schedules import Schedule
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.base import Player, TrainingModule, trainable
from tessellar.training.optim import OptimizerSettings


class Reconstruction(TrainingModule):
    """A tokenizer and nothing but the squared error of its reconstruction."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(1.0, 1, 10)
        self.tokenizer = tokenizer

    @property
    def ema_target(self) -> nn.Module:
        return self.tokenizer

    def parts(self) -> dict[str, nn.Module | None]:
        return {"tokenizer": self.tokenizer}

    def make_players(self) -> list[Player]:
        optimizers = OptimizerSettings().make(self.tokenizer)
        return [
            Player("tokenizer", [self.tokenizer], trainable(self.tokenizer), optimizers, Schedule())
        ]

    def training_step(self, batch: dict[str, Any], _: int) -> dict[str, Tensor]:
        output = self.tokenizer(batch["image"])
        loss = (output.reconstruction - batch["image"]).square().mean()
        self.backward_and_step(self.players[0], loss)
        self.finish_batch(len(batch["image"]))
        return {"loss": loss.detach(), "tokens": output.tokens}


def test_it_trains_and_its_checkpoint_and_export_load(fit, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Reconstruction(ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2))
    trainer, losses = fit(module, 3)
    assert len(losses) == 3 and module.facts().tokens == 16 and module.facts().positions is None
    assert not module.takes_turns and not module.reads_labels
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module.export(tmp_path / "export", Record(title="third"))
    weights = module.tokenizer.state_dict()
    for path in (tmp_path / "a.ckpt", tmp_path / "export"):
        loaded = tessellar.load(path)
        assert isinstance(loaded, ViTVQ)
        assert all(
            torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items()
        )

"""FLASH's drafter is trained by the training module against a frozen export, and drafts for it."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tessellar.callbacks.grids import Grids
from tessellar.callbacks.pictures import Pictures
from tessellar.checkpoints.export import export_generator
from tessellar.cli.next_steps import Called, next_steps
from tessellar.data import FashionMNISTData
from tessellar.errors import UserError
from tessellar.models.flash import FlashDrafter
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.choice import Choice
from tessellar.sampling.flash import FlashDrafts
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings


def test_a_drafter_learns_from_a_frozen_export_and_drafts_for_it(fit, make, tmp_path: Path) -> None:
    """The laws of a new generator are even: once that is learnt, most drafts stay."""
    target = make.generator_module()
    path = export_generator(target.model, tmp_path / "target")
    model = load(path)
    assert isinstance(model, ImageGenerator)
    head = torch.nn.init.normal_(torch.empty(16, 16), generator=torch.Generator().manual_seed(3))
    model.generator.output.weight.data.copy_(head)  # type: ignore[union-attr]
    path = export_generator(model, tmp_path / "shaken")
    drafter = partial(
        FlashDrafter, width=16, num_heads=2, num_classes=10, drafts=3, ffn_multiple_of=8
    )
    settings = {"optimizer": OptimizerSettings(lr=1e-2), "target": str(path)}
    module = GeneratorModule(target.model.tokenizer, drafter, **settings)  # type: ignore[arg-type]
    before = export_generator(module.model, tmp_path / "untrained")
    _, losses = fit(module, 40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = export_generator(module.model, tmp_path / "trained")
    frozen = {
        name
        for name in (tmp_path / "trained" / "config.yaml").read_text().split()
        if "shaken" in name
    }
    assert not frozen  # the export knows nothing of the generator's file
    taken = {}
    for name, export in (("before", before), ("after", after)):
        recorder = Recorder()
        sampling = Sampling(choice=Choice(), algorithm=FlashDrafts(str(export)))
        model.sample_tokens(model.class_condition([0, 1, 2, 3]), sampling, range(4), recorder)
        taken[name] = recorder.evaluations
    assert taken["after"] < taken["before"] <= 64
    with pytest.raises(UserError, match="is no drafter; FlashDrafts takes"):
        Sampling(algorithm=FlashDrafts(str(path))).tokens(
            model.generator, model.class_condition([0]), [0]
        )


def test_a_drafter_is_validated_without_samples_and_says_how_it_is_used(
    fit, make, tmp_path: Path
) -> None:
    target = make.generator_module()
    path = export_generator(target.model, tmp_path / "target")
    drafter = partial(
        FlashDrafter, width=16, num_heads=2, num_classes=10, drafts=3, ffn_multiple_of=8
    )
    module = GeneratorModule(target.model.tokenizer, drafter, target=str(path))
    (tmp_path / "run").mkdir()
    run: Any = SimpleNamespace(folder=tmp_path / "run")
    watching = [Grids(run, Sampling(), columns=1), Pictures(samples=2)]
    fit(module, 2, watching, limit_val_batches=1, val_check_interval=2)
    assert not list((tmp_path / "run").iterdir())
    assert not list((tmp_path / "pictures").glob("neighbours*"))
    (line,) = next_steps(module, tmp_path / "run", Called("x.yaml", FashionMNISTData, {}))
    assert line.endswith(
        f"GENERATOR --algorithm FlashDrafts --algorithm.model {tmp_path}/run/export"
    )
    # A generator that draws by itself has both.
    fit(target, 2, watching, limit_val_batches=1, val_check_interval=2)
    assert (tmp_path / "run" / "pictures").is_dir()
    assert list((tmp_path / "pictures").glob("neighbours*"))


def test_a_target_is_for_who_learns_from_one(fit, make, tmp_path: Path) -> None:
    path = export_generator(make.generator_module().model, tmp_path / "target")
    with pytest.raises(UserError, match="LlamaGen learns from tokens alone: leave target out"):
        fit(make.generator_module(target=str(path)), 1)

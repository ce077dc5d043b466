"""Optimizer states follow the names of their parameters into a resumed run, whatever groups they are in."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.tags import tag
from tessellar.models.har import HAR
from tessellar.models.mar import MAR
from tessellar.models.maskgit import MaskGIT
from tessellar.models.rar import RAR
from tessellar.models.retok import ReToKGPT
from tessellar.models.var import VAR
from tessellar.protocol.layout import (
    Categorical,
    Continuous,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.training.base import STATE_KEY, TrainingModule
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings
from tessellar.training.optimizer_names import FORMERLY_DECAYED, former_names

DECAY = OptimizerSettings(lr=1e-3, weight_decay=0.1)
SCALES = Layout((Segment((1, 1), Categorical(50), "a"), Segment((2, 2), Categorical(50), "b")))
CODES = sequence_layout(16, Categorical(50))


def rar_module(make) -> GeneratorModule:
    tokenizer = make.tokenizer_module().tokenizer
    torch.manual_seed(0)
    return GeneratorModule(
        tokenizer, partial(RAR, width=16, depth=1, num_heads=2, hidden=16), optimizer=DECAY
    )


def moments(module: TrainingModule) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizers = [optimizer for player in module.players for optimizer in player.optimizers]
    return {
        names[id(p)]: s["exp_avg"].clone()
        for optimizer in optimizers
        for p, s in optimizer.state.items()
    }


def trained(
    fit: Any, module: TrainingModule, steps: int, **options: Any
) -> tuple[list[float], L.Trainer]:
    trainer, losses = fit(module, steps, **options)
    return losses, trainer


def test_a_parameter_that_changes_its_group_keeps_its_moments(
    fit, make, tmp_path: Path, caplog
) -> None:
    before = make.generator_module(optimizer=DECAY)
    _, trainer = trained(fit, before, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    after = make.generator_module(optimizer=DECAY)
    tag(after.model.generator.token_embedding.weight, "no_decay")
    with caplog.at_level(logging.WARNING):
        trained(fit, after, 2, ckpt_path=tmp_path / "a.ckpt")
    kept = moments(after)
    assert kept.keys() == moments(before).keys()
    assert [
        name for name, value in moments(before).items() if not torch.equal(value, kept[name])
    ] == []
    assert [group["weight_decay"] for group in after.players[0].optimizers[0].param_groups] == [
        0.1,
        0.0,
    ]
    (line,) = [record.getMessage() for record in caplog.records if "resumed" in record.getMessage()]
    assert line == (
        "resumed: weight_decay is now 0.0, in the checkpoint 0.1, for 1 parameters: "
        "model.generator.token_embedding.weight"
    )


def test_a_checkpoint_from_before_names_were_listed_resumes_as_one_that_has_them(
    fit, make, tmp_path: Path
) -> None:
    """RAR then: its tables of tokens and the last modulation decayed, its start token did not."""
    module = rar_module(make)
    _, trainer = trained(fit, module, 2)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    (names,) = checkpoint[STATE_KEY].pop("parameters")
    (states,) = checkpoint["optimizer_states"]
    places = {name: number for number, name in enumerate(names)}
    parameters = {name: p for name, p in module.named_parameters() if name in places}
    never = ("start_token", "position", "target_position", "step_embedding")
    decayed = [name for name, p in parameters.items() if p.ndim >= 2 and not name.endswith(never)]
    old = [*decayed, *(name for name in parameters if name not in decayed)]
    assert old != names
    states["state"] = {number: states["state"][places[name]] for number, name in enumerate(old)}
    first, second = states["param_groups"]
    first["params"], second["params"] = (
        list(range(len(decayed))),
        list(range(len(decayed), len(old))),
    )
    torch.save(checkpoint, tmp_path / "old.ckpt")
    losses = {}
    for kind in ("new", "old"):
        resumed = rar_module(make)
        losses[kind], _ = trained(fit, resumed, 4, ckpt_path=tmp_path / f"{kind}.ckpt")
        losses[kind] += [float(value.double().sum()) for value in moments(resumed).values()]
    assert losses["old"] == losses["new"]


def test_states_of_other_parameters_are_refused(fit, make, tmp_path: Path) -> None:
    _, trainer = trained(fit, make.generator_module(optimizer=DECAY), 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = make.generator_module(optimizer=DECAY)
    module.model.generator.output.requires_grad_(False)
    with pytest.raises(
        UserError,
        match="other parameters than this run's .1 unknown: model.generator.output.weight",
    ):
        trained(fit, module, 2, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="states of 1 optimizers, this run has 2"):
        other = make.generator_module(optimizer=OptimizerSettings("muon"))
        trained(fit, other, 2, ckpt_path=tmp_path / "a.ckpt")


MODELS: dict[str, nn.Module] = {
    "RAR": RAR(CODES, 64, 1, 4, 128, 10),
    "MaskGIT": MaskGIT(CODES, "vit", 64, 1, 4, 128, 10),
    "HAR": HAR(CODES, 64, 1, 4, 10, 4),
    "VAR": VAR(SCALES, 64, 1, 4, 10, 8),
    "MAR": MAR(grid_layout(8, 8, Continuous(4)), 64, 1, 4, None, 64, 1, 10),
    "ReToKGPT": ReToKGPT(CODES, 64, 1, 4, 10),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_former_groups_differ_where_the_table_says(name: str) -> None:
    """What decayed then comes before all vectors; what did not comes behind matrices that follow it in the module."""
    model = MODELS[name]
    optimizers = OptimizerSettings(weight_decay=0.1).make(model)
    (former,) = former_names(optimizers, model)
    vectors = {key for key, parameter in model.named_parameters() if parameter.ndim < 2}
    names = [key for key, _ in model.named_parameters()]
    matrices = {
        f"{key}.weight" for key, part in model.named_modules() if isinstance(part, nn.Linear)
    }
    first_vector = min(former.index(key) for key in vectors)
    for pattern, decayed in FORMERLY_DECAYED[name].items():
        matched = [key for key in former if Path(key).match(pattern)]
        assert matched, pattern
        for key in matched:
            later = names[names.index(key) + 1 :]
            behind = any(
                other in matrices and former.index(other) < former.index(key) for other in later
            )
            assert former.index(key) < first_vector if decayed else behind, key

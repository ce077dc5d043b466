"""What older versions wrote still works: exports load and give what they gave, checkpoints resume, caches train.

The files of each version stand under `data_of_versions/<version>`, whose `make.py` says what they hold and how that
version's code wrote them. Values are compared closely, not to the bit: they were made on another machine.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tessellar
from tessellar.checkpoints.weights import with_current_names
from tessellar.cli.train import fit, parse
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.noise import Noise
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.settings import Sampling

VERSIONS = sorted((Path(__file__).parent / "data_of_versions").iterdir())
EXPORTS = sorted(
    file.parent for version in VERSIONS for file in version.glob("exports/*/config.yaml")
)
RUNS = sorted(file.parent for version in VERSIONS for file in version.glob("runs/*/last.ckpt"))


class FormerNoise(Noise):
    """What 0.1 drew from: a generator's state for each image. Everything else has stayed as it was."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        super().__init__(seeds, device)
        self.streams = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def _draw(self, function: Callable[..., Tensor], *shape: int) -> Tensor:
        return torch.stack([function(*shape, generator=stream) for stream in self.streams])

    def uniform(self, *shape: int) -> Tensor:
        return self._draw(torch.rand, *shape)

    def normal(self, *shape: int) -> Tensor:
        return self._draw(torch.randn, *shape)

    def exponential(self, *shape: int) -> Tensor:
        drawn = -torch.log1p(-self.uniform(*shape))
        return drawn.clamp(min=torch.finfo(torch.float32).tiny)


def name_of(folder: Path) -> str:
    return f"{folder.parents[1].name}-{folder.name}"


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("folder", EXPORTS, ids=name_of)
@torch.no_grad()
def test_an_export_gives_what_it_gave(folder: Path) -> None:
    model = tessellar.load(folder)
    expected = load_file(folder / "expected.safetensors")
    if isinstance(model, Tokenizer):
        check_tokenizer(model, expected)
    else:
        check_generator(model, expected)


def check_tokenizer(model: Tokenizer, expected: dict[str, Tensor]) -> None:
    tokens = model.encode(expected["images"])
    close(tokens, expected["tokens"])
    with patch("tessellar.tokenizers.parts.latent_maps.Noise", FormerNoise):  # its decoder draws
        decoded = model.decode(expected["tokens"])
    close(decoded, expected["decoded"])


def check_generator(model: ImageGenerator, expected: dict[str, Tensor]) -> None:
    generator, tokens = model.generator, expected["tokens"]
    prefix = "condition."
    given = {
        name.removeprefix(prefix): t for name, t in expected.items() if name.startswith(prefix)
    }
    condition = Condition(**given)
    torch.manual_seed(0)
    losses = generator.loss(tokens, condition)
    if "text_balance" in losses:  # what 0.1 called `text` is now a mean and what weighs it
        losses["text"] = losses["text"] + losses.pop("text_balance")
    for term, value in losses.items():
        close(value, expected[f"loss.{term}"])
    if "logits" in expected:
        distribution = generator.predict(
            generator.start(condition), tokens, generator.entities.count
        )
        assert isinstance(distribution, Logits)
        close(distribution.logits, expected["logits"])
    with patch("tessellar.sampling.settings.Noise", FormerNoise):
        drawn = model.sample_tokens(condition, Sampling(), [0, 1])
    close(drawn, expected["drawn"])


def test_its_single_file_is_enough() -> None:
    for folder in EXPORTS:
        if folder.name in ("vit_vq", "llamagen"):
            whole, single = tessellar.load(folder), tessellar.load(folder / "model.safetensors")
            again = single.state_dict()
            assert type(single) is type(whole)
            assert all(
                torch.equal(tensor, again[name]) for name, tensor in whole.state_dict().items()
            )


class Seen(L.Callback):
    """What the optimizers hold when a resumed run begins, by parameter."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = {
                        key: float(torch.as_tensor(value).double().norm())
                        for key, value in optimizer.state[parameter].items()
                    }
                    self.found[names[id(parameter)]] = {
                        "weight_decay": group["weight_decay"],
                        "state": state,
                    }


@pytest.mark.parametrize("folder", RUNS, ids=name_of)
def test_a_checkpoint_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments lie on their parameters; where no parameter changed its decay, the weights go where they went."""
    for part in ("exports", "cache"):
        (tmp_path / part).symlink_to(folder.parents[1] / part)
    monkeypatch.chdir(tmp_path)
    # The old values are Muon's in bfloat16, whatever this processor computes fast.
    monkeypatch.setattr("tessellar.training.optim.computes_bfloat16", lambda: True)
    seen = Seen()
    options = [
        "--resume",
        str(folder / "last.ckpt"),
        "--name",
        "resumed",
        "--trainer.max_steps",
        "5",
    ]
    cli = parse(["--config", str(folder / "run.yaml"), *options])
    cli.trainer.callbacks.append(seen)  # type: ignore[attr-defined]
    fit(cli)
    expected = with_current_names(cli.model, json.loads((folder / "moments.json").read_text()))
    assert seen.found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert seen.found[name]["state"] == pytest.approx(theirs["state"], rel=1e-6), name
    assert cli.model.updates == 5 and (tmp_path / "runs/resumed/export/model.safetensors").is_file()
    if all(
        seen.found[name]["weight_decay"] == theirs["weight_decay"]
        for name, theirs in expected.items()
    ):
        after = with_current_names(cli.model, load_file(folder / "after.safetensors"))
        ours = cli.model.state_dict()
        for name, tensor in after.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-5)

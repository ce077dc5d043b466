"""One batch that is not finite costs one update, and nothing else: no buffer, no code, no checkpoint holds a trace."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.layers.batch_norm import BatchNorm2d
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.ema_vq import EMAVectorQuantizer
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.training.base import STATE_KEY, TrainingModule
from tessellar.training.tokenizer_module import TokenizerModule

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "ema": lambda: EMAVectorQuantizer(16, 4),
    "ema, not normalised": lambda: EMAVectorQuantizer(16, 4, l2_normalize=False),
    "ema with restarts": lambda: EMAVectorQuantizer(16, 4, threshold=1.0),
    "ema from data": lambda: EMAVectorQuantizer(16, 4, init_step=2),
    "clustering": lambda: ClusteringVQ(16, 4),
    "gaussian": lambda: GaussianBottleneck(4),
    "plain": lambda: VectorQuantizer(16, 4),
    "from data at once": lambda: VectorQuantizer(16, 4, init_step=1),
    "from data now": lambda: VectorQuantizer(16, 4, init_step=2),
    "with restarts": lambda: VectorQuantizer(16, 4, restart_every=2),
    "restarts each pass": lambda: VectorQuantizer(16, 4, l2_normalize=False, restart_every=1),
}
POISON = (math.nan, math.inf, -math.inf, 3e38)  # the last overflows in sums and squares


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("value", POISON[:3])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_poisoned_pass_of_a_quantizer_is_as_if_it_had_not_been(kind: str, value: float) -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS[kind]().train()
    good = torch.randn(8, 16, quantizer.in_dim)
    quantizer(good)
    untouched = copy.deepcopy(quantizer)
    before = state(quantizer)
    bad = good.clone()
    bad[0, 3, 1] = value
    quantizer(bad)
    assert same(before, state(quantizer)) == []

    for one in (quantizer, untouched):
        torch.manual_seed(1)
        one(good)
    assert same(state(quantizer), state(untouched)) == []
    assert all(bool(torch.isfinite(tensor).all()) for tensor in quantizer.state_dict().values())


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_values_that_overflow_leave_no_trace_that_is_not_finite(kind: str) -> None:
    quantizer = QUANTIZERS[kind]().train()
    for _ in range(3):
        quantizer(torch.full((8, 16, quantizer.in_dim), POISON[3]))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in quantizer.state_dict().values())


@pytest.mark.parametrize("value", POISON[:3])
def test_statistics_of_logits_and_of_batches_stay_as_they_were(value: float) -> None:
    lecam, norm = LeCam(), BatchNorm2d(3).train()
    lecam(torch.ones(2), torch.zeros(2))
    norm(torch.randn(4, 3, 5, 5))
    before = {**state(lecam), **state(norm)}
    images = torch.randn(4, 3, 5, 5)
    images[0, 1, 2, 2] = value
    lecam(torch.tensor([1.0, value]), torch.zeros(2))
    norm(images)
    assert same(before, {**state(lecam), **state(norm)}) == []


def test_batch_norm_of_finite_batches_is_torchs() -> None:
    own, torchs = BatchNorm2d(3, momentum=None).train(), nn.BatchNorm2d(3, momentum=None).train()
    for seed in range(3):
        images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(own(images), torchs(images))
    assert same(state(own), state(torchs)) == []


def poison_batches(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> list[dict[str, Tensor]]:
    """Make image 0 of these batches (from 0 on) NaN; gives the module's tensors before and after each batch."""
    step, states = TokenizerModule.training_step, []

    def poisoned(self: TokenizerModule, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        states.append(state(self))
        if self.batches in numbers:
            batch = {**batch, "image": batch["image"].clone()}
            batch["image"][0] = math.nan
        return step(self, batch, index)

    monkeypatch.setattr(TokenizerModule, "training_step", poisoned)
    return states


@pytest.mark.parametrize(
    "quantizer",
    [
        {
            "class_path": "tessellar.tokenizers.quantizers.ema_vq.EMAVectorQuantizer",
            "init_args": {"init_step": 3},
        },
        {"class_path": "tessellar.tokenizers.quantizers.clustering.ClusteringVQ", "init_args": {}},
        {
            "class_path": "tessellar.tokenizers.quantizers.vq.VectorQuantizer",
            "init_args": {"init_step": 3},
        },
    ],
)
def test_a_run_recovers_on_the_next_batch(
    call, config, folder: Path, monkeypatch, quantizer: dict[str, Any]
) -> None:
    """Also with a discriminator of batch norms and LeCam; the poisoned update counts, and changed no tensor."""
    states = poison_batches(monkeypatch, 2)
    quantizer["init_args"] |= {"vocab_size": 16, "dim": 4}
    model = config["model"]["init_args"]
    model["tokenizer"]["init_args"]["quantizer"] = quantizer
    losses = "tessellar.tokenizers.losses"
    model["loss"]["init_args"] = {
        "discriminator": {
            "class_path": f"{losses}.discriminator.PatchGAN",
            "init_args": {"channels": 8, "depth": 1},
        },
        "lecam": {"class_path": f"{losses}.lecam.LeCam", "init_args": {}},
        "adversarial_start": 0,
    }
    code, said = call(config)
    assert code == 0, said
    assert said.count("is not finite, skipped") <= 2  # of the tokenizer and of the discriminator
    assert same(states[2], states[3]) == []
    assert len(same(states[3], states[4])) > 10  # and then it learns again
    last = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == last[STATE_KEY]["updates"] == 6
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last["state_dict"].values())


def test_an_update_of_several_batches_is_left_out_whole(call, config, monkeypatch) -> None:
    states = poison_batches(monkeypatch, 3)
    model = config["model"]["init_args"]
    model["accumulate"] = 2
    model["tokenizer"]["init_args"]["quantizer"]["class_path"] = (
        "tessellar.tokenizers.quantizers.ema_vq.EMAVectorQuantizer"
    )
    assert call(config)[0] == 0
    assert same(states[2], states[4]) == [] and same(states[2], states[3]) != []


def test_a_run_whose_batches_are_all_poisoned_ends_and_keeps_a_whole_checkpoint(
    call, config, monkeypatch
) -> None:
    poison_batches(monkeypatch, *range(3, 100))
    config["trainer"]["max_steps"] = 50
    code, said = call(config)
    assert code == 2 and "10 updates in a row of the tokenizer had no finite gradient" in said
    assert "Traceback" not in said
    last = torch.load("runs/x/checkpoints/last.ckpt", weights_only=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """However they came to be so: a checkpoint of them would replace the one that can be continued."""
    module: Any = nn.Linear(2, 2)
    module.updates, module.best_by = 1, ("val/loss", "min")
    trainer: Any = SimpleNamespace(
        lightning_module=module,
        is_global_zero=True,
        sanity_checking=False,
        callback_metrics={"val/loss": torch.tensor(1.0)},
        state=SimpleNamespace(fn="fit"),
        save_checkpoint=lambda path: torch.save(module.state_dict(), path),
    )
    callback = Checkpoints(tmp_path, 1, "val/loss", "min")
    callback.save(trainer, module)
    with torch.no_grad():
        module.bias[1] = math.inf
    module.updates = 2
    for attempt in (
        lambda: callback.save(trainer, module),
        lambda: callback.on_validation_end(trainer, module),
    ):
        with pytest.raises(Exception, match="bias is not finite any more, so nothing is saved"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_first_finite_value_is_best_after_nan(call, config, monkeypatch) -> None:
    """NaN in the first validation does not fix best.ckpt for ever, nor does one in an older checkpoint."""
    original = TokenizerModule.validation_step
    validations = []

    def first_is_nan(self: TrainingModule, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        validations.append(self.updates)
        if self.updates <= 3:
            batch = {**batch, "image": batch["image"] * math.nan}
        return original(self, batch, index)  # type: ignore[arg-type]

    monkeypatch.setattr(TokenizerModule, "validation_step", first_is_nan)
    assert call(config)[0] == 0 and validations == [3, 6]
    best = torch.load("runs/x/checkpoints/best.ckpt", weights_only=True)
    assert best[STATE_KEY]["updates"] == 6
    older = Checkpoints("runs", 1, "val/loss", "min")
    older.load_state_dict({"best": math.nan})
    assert older.is_better(1.0) and not older.is_better(math.nan)

"""The gradient noise scale: exact on a law that is known, harmless to a run, kept over a resume."""

from pathlib import Path

import pytest
import torch

from tessellar.callbacks.noise_scale import GradientNoiseScale
from tessellar.errors import UserError
from tests.training.conftest import fit, make, make_data  # noqa: F401
from tests.training.test_resume import SaveAll


def test_of_gaussian_gradients_it_is_their_variance_over_their_square() -> None:
    """Gradients N(mean, I) of 50 numbers, |mean|^2 = 2: the scale is 50 / 2 samples."""
    torch.manual_seed(0)
    mean = torch.full((50,), 0.2)
    callback = GradientNoiseScale(decay=0.999)
    for _ in range(4000):
        batches = mean + torch.randn(4, 8, 50).mean(1)  # four batches of eight samples
        small = float(batches.square().sum(1).mean())
        large = float(batches.mean(0).square().sum())
        callback.add(small, large, small_size=8, batches=4)
    assert callback.scale == pytest.approx(25.0, rel=0.1)


def test_it_sees_the_gradients_of_batches_and_changes_nothing(fit, make) -> None:  # noqa: F811
    seen: list[tuple[float, float, int, int]] = []

    class Watched(GradientNoiseScale):
        def add(self, small: float, large: float, small_size: int, batches: int) -> None:
            seen.append((small, large, small_size, batches))
            super().add(small, large, small_size, batches)

    def run(*callbacks):
        module = make.tokenizer_module(accumulate=2, clip=0.01)
        _, losses = fit(module, 2, list(callbacks))
        return module, losses

    module, losses = run(Watched(every=1))
    _, plain = run()
    assert losses == plain and [row[2:] for row in seen] == [(8, 2), (8, 2)]
    # The first update's two batches, one by one.
    again = make.tokenizer_module(accumulate=2)
    norms = []
    gradients = []
    sampler = make_data().train_dataloader()
    for batch, _ in zip(sampler, range(2), strict=False):
        again.zero_grad()
        output = again.tokenizer.of_batch(batch)
        terms = again.loss.generator_loss(batch["image"], output, 0, again.tokenizer.last_layer)
        terms.total.backward()
        flat = torch.cat(
            [p.grad.flatten() for p in again.tokenizer.parameters() if p.grad is not None]
        )
        norms.append(float(flat.square().sum()))
        gradients.append(flat)
    assert seen[0][0] == pytest.approx(sum(norms) / 2, rel=1e-4)
    assert seen[0][1] == pytest.approx(float((sum(gradients) / 2).square().sum()), rel=1e-4)


def test_a_resume_goes_on_with_its_means(fit, make, tmp_path: Path) -> None:  # noqa: F811
    def run(**options) -> GradientNoiseScale:
        callback = GradientNoiseScale(every=1)
        fit(make.tokenizer_module(accumulate=2), 3, [callback, SaveAll(tmp_path)], **options)
        return callback

    whole = run()
    resumed = run(ckpt_path=tmp_path / "batch_2.ckpt")
    assert whole.state_dict() == resumed.state_dict() and whole.looked == 3


def test_one_batch_an_update_is_refused(fit, make) -> None:  # noqa: F811
    with pytest.raises(UserError, match="accumulate is 1"):
        fit(make.tokenizer_module(), 1, [GradientNoiseScale()])

"""Both training modules: what is counted, clipped, accumulated, frozen, repeated and refused."""

import logging
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from tessellar.callbacks.ema import EMA
from tessellar.models.rar import RAR
from tessellar.schedules import Schedule
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.training.base import COUNTERS, STATE_KEY
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.methods.order_annealing import OrderAnnealing
from tessellar.training.optim import OptimizerSettings


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_two_optimizers_count_once(fit, make) -> None:
    module = make.tokenizer_module(PatchGAN(8, 1))
    before = weights(module.discriminator)
    trainer, _ = fit(module, 5)
    assert (
        len(trainer.optimizers) == 3
    )  # AdamW and Muon for the tokenizer, AdamW for the discriminator
    assert trainer.global_step == module.updates == module.batches == 5
    assert any(
        not torch.equal(a, b) for a, b in zip(before, weights(module.discriminator), strict=True)
    )


def test_the_discriminator_may_be_updated_first(fit, make) -> None:
    """Then the tokenizer's adversarial loss is that of the new discriminator."""
    for first in (False, True):
        module = make.tokenizer_module(PatchGAN(8, 1), discriminator_first=first)
        step, turns = module.backward_and_step, []

        def note(player, loss, step=step, turns=turns) -> None:
            turns.append(player.name)
            step(player, loss)

        module.backward_and_step = note
        fit(module, 2)
        turn = ["discriminator", "tokenizer"] if first else ["tokenizer", "discriminator"]
        assert turns == ["tokenizer", *turn]


def test_a_discriminator_has_its_own_schedule_from_its_own_start(fit, make) -> None:
    own = Schedule("linear", warmup=2, length=10)
    module = make.tokenizer_module(
        PatchGAN(8, 1), schedule=Schedule("linear"), discriminator_schedule=own
    )
    assert module.loss.adversarial_start == 1
    seen: list[tuple[int, float]] = []

    def note(values) -> None:
        factors = [
            value for name, value in values.items() if name == "train/lr_factor_discriminator"
        ]
        seen.extend((module.updates, value) for value in factors)

    module.log_train = note
    fit(module, 5)
    assert seen == [(1, 0.5), (2, 1.0), (3, 1.0), (4, 1 - 1 / 8)]


def test_losses_of_a_seed_repeat_to_the_bit(fit, make) -> None:
    for factory in (make.tokenizer_module, make.generator_module):
        _, first = fit(factory(), 4)
        _, second = fit(factory(), 4)
        assert first == second and len(set(first)) > 1


def test_accumulated_batches_equal_one_large_batch(fit, make) -> None:
    """Two batches of 8 move the weights as one of 16 does (same samples; dropout off)."""
    settings = {"optimizer": OptimizerSettings("adam", lr=1e-2), "clip": 0.5}
    results = []
    for accumulate, batch in ((1, 16), (2, 8)):
        module = make.generator_module(accumulate=accumulate, **settings)
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        module.model.generator.conditioning.dropout = 0.0
        trainer, _ = fit(module, 2, data=make.data(batch))
        assert module.updates == trainer.global_step == 2 and module.batches == 2 * accumulate
        results.append(weights(module.model.generator))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_clipping_bounds_the_gradient(fit, make) -> None:
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(
                float(
                    torch.nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]])
                )
            )
            return super().step(closure)

    class Settings(OptimizerSettings):
        def make(self, *modules):
            optimizer = Spy([p for m in modules for p in m.parameters()], lr=0.1)
            optimizer.param_groups[0]["peak_lr"] = 0.1
            return [optimizer]

    fit(make.generator_module(optimizer=Settings(), clip=1e-3), 3)
    assert norms and max(norms) <= 1.001e-3


def test_the_tokenizer_stays_frozen_and_in_eval_mode(fit, make) -> None:
    module = make.generator_module()
    before, trained = weights(module.tokenizer), weights(module.model.generator)
    trainer, _ = fit(module, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module.tokenizer), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(trained, weights(module.model.generator), strict=True)
    )
    assert not module.tokenizer.training and module.model.generator.training
    owned = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert not owned & {id(p) for p in module.tokenizer.parameters()}


def test_a_batch_may_bring_tokens(make) -> None:
    module = make.generator_module()
    batch = next(iter(_loader(make)))
    tokens = module.tokens_of(batch)
    assert torch.equal(module.tokens_of({"tokens": tokens}), tokens)
    assert torch.equal(tokens, module.tokenizer.encode(batch["image"]))


def _loader(make):
    data = make.data()
    data.setup("fit")
    return data.train_dataloader()


def test_poisoned_batches_are_skipped_then_stop_the_run(fit, make) -> None:
    module, ema = make.generator_module(max_skipped=3), EMA(0.9)
    original, calls = module.model.generator.loss, [0]

    def poisoned(tokens, condition, weight=None):
        calls[0] += 1
        losses = original(tokens, condition, weight)
        return (
            {k: v * float("nan") for k, v in losses.items()} if calls[0] in (2, 5, 6, 7) else losses
        )

    module.model.generator.loss = poisoned
    with pytest.raises(RuntimeError, match="3 updates in a row"):
        fit(module, 10, [ema])
    assert calls[0] == 7 and module.skipped == 4
    assert all(
        bool(torch.isfinite(t).all())
        for t in [*module.model.generator.parameters(), *ema.average.values()]
    )


def test_a_loss_that_is_not_finite_skips_its_update_even_where_its_gradient_is(fit, make) -> None:
    module = make.generator_module(max_skipped=2)
    original = module.model.generator.loss
    module.model.generator.loss = lambda *given: {
        **original(*given),
        "constant": torch.tensor(float("inf")),
    }
    before = weights(module.model.generator)
    with pytest.raises(RuntimeError, match="2 updates in a row"):
        fit(module, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(before, weights(module.model.generator), strict=True)
    )


def test_each_player_has_its_own_count_of_skipped_updates(fit, make) -> None:
    """A discriminator with finite gradients does not hide a tokenizer that never learns."""
    module = make.tokenizer_module(PatchGAN(8, 1), max_skipped=3)
    original = module.loss.generator_loss

    def poisoned(*arguments):
        terms = original(*arguments)
        return terms._replace(total=terms.total * float("nan"))

    module.loss.generator_loss = poisoned
    with pytest.raises(RuntimeError, match="3 updates in a row of the tokenizer"):
        fit(module, 10)


@pytest.mark.parametrize(
    ("accumulate", "options", "expected"),
    [
        (1, {"max_steps": 5}, 5),
        (2, {"max_steps": -1, "max_epochs": 3}, 3 * 8 // 2),
        (1, {"max_epochs": 1}, 8),
    ],
)
def test_length_of_the_run_for_schedules(
    fit, make, accumulate: int, options: dict[str, int], expected: int
) -> None:
    module = make.generator_module(accumulate=accumulate)
    trainer, _ = fit(module, **{"steps": options.pop("max_steps", 100), **options})
    assert module.total_updates == expected == module.updates == trainer.global_step


def test_validation_loss_of_an_untrained_generator_is_that_of_a_uniform_guess(fit, make) -> None:
    module = make.generator_module(optimizer=OptimizerSettings(lr=0.0))
    trainer, _ = fit(module, 2, limit_val_batches=1.0)
    trainer.validate(module, make.data(), verbose=False)
    metrics = trainer.callback_metrics
    assert float(metrics["val/loss"]) == pytest.approx(math.log(16), rel=1e-5)
    assert float(metrics["val/nats_per_image"]) == pytest.approx(16 * math.log(16), rel=1e-5)


def test_counters_and_optimizers_survive_a_checkpoint(fit, make, tmp_path: Path) -> None:
    first = make.tokenizer_module()
    trainer, _ = fit(first, 8)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    counts = {name: content[STATE_KEY][name] for name in COUNTERS}
    assert counts == {"batches": 8, "updates": 8, "skipped": 0, "epoch": 1, "epoch_samples": 0}
    second = make.tokenizer_module()
    trainer, losses = fit(second, 10, ckpt_path=path)
    assert second.updates == 10 and len(losses) == 2
    momenta = [s for o in trainer.optimizers for s in o.state_dict()["state"].values()]
    assert momenta and all(int(s["step"]) == 10 for s in momenta if "step" in s)


@pytest.mark.parametrize("anneals", [False, True])
def test_random_orders_that_nothing_anneals_are_said_at_the_start(
    make, fit, caplog, anneals: bool
) -> None:
    generator = partial(RAR, width=16, depth=1, num_heads=2, hidden=16)
    module = GeneratorModule(make.tokenizer_module().tokenizer, generator)
    with caplog.at_level(logging.WARNING):
        fit(module, 1, callbacks=[OrderAnnealing(0, 1)] if anneals else [])
    assert (
        "RAR trains on random orders in 100 % of its samples to the end" in caplog.text
    ) is not anneals

"""Alignment: advantages, ratios, who is trained, contrasts, distribution rewards, exact resume."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import tessellar
from tessellar.callbacks.ema import EMA
from tessellar.checkpoints.export import export_generator
from tessellar.data.sets.shapes import ShapesData
from tessellar.errors import UserError
from tessellar.networks import facts as networks
from tessellar.networks.facts import NetworkFacts
from tessellar.networks.vision import VisionModel
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import Guidance, Linear
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling
from tessellar.tensor_files import write_safetensors
from tessellar.training.alignment import (
    CCA,
    GRPO,
    ClassifierReward,
    CLIPScore,
    DecoderTuning,
    LeaveOneOutFrechet,
    ReconstructionReward,
    StraightThrough,
    VAPi,
)
from tessellar.training.alignment.cca import contrastive_loss, equal_rows
from tessellar.training.alignment.method import AlignmentMethod, Batch, ungenerated
from tessellar.training.alignment.policy import clipped_surrogate, group_advantages, k3
from tessellar.training.alignment.rewards import Drawn, Material, Reward, repeated
from tessellar.training.alignment.va_pi import mean_of_kept
from tessellar.training.alignment_module import AlignmentModule
from tessellar.training.methods.context_noise import ContextNoise
from tessellar.training.optim import OptimizerSettings
from tessellar.training.random_state import new_seeds
from tests.sampling.search.test_network_verifiers import clip  # noqa: F401
from tests.training.conftest import make_generator_module
from tests.training.test_resume import Drawing, SaveAll, differences, everything

FAST = OptimizerSettings(lr=1e-2, betas=(0.9, 0.999))


class Brightness(Reward):
    """Bright images are good."""

    def forward(self, drawn: Drawn) -> Tensor:
        return drawn.images.flatten(1).mean(1)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """An export of a tiny generator whose predictions depend on what it reads."""
    model = make_generator_module().model
    for parameter in model.generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(next(model.tokenizer.quantizer.parameters()))
    return str(export_generator(model, tmp_path / "source"))


def aligned(source: str, method: AlignmentMethod, **options: Any) -> AlignmentModule:
    return AlignmentModule(source, method, **{"optimizer": FAST, **options})


def batch_of(model: ImageGenerator, count: int = 4, progress: float = 0.0) -> Batch:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 16, 16, generator=draw) * 2 - 1
    labels = torch.arange(count) % 10
    data = {"image": images, "label": labels}
    return Batch(model.encode(images), Condition(ids=labels), data, progress)


def copies(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    after = module.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_advantages_are_against_the_others_of_a_group() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    expected = torch.tensor([-0.9258, -0.4629, 0.0, 1.3887])
    torch.testing.assert_close(group_advantages(rewards, 4, 1e-4), expected, atol=1e-4, rtol=0)
    drawn = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).flatten()
    advantages = group_advantages(drawn, 5)
    grouped = advantages.view(6, 5)
    torch.testing.assert_close(grouped.mean(1), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(grouped.std(1), torch.ones(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(group_advantages(3 * drawn + 7, 5), advantages, atol=1e-4, rtol=0)
    assert torch.equal(group_advantages(torch.full((4,), 0.1), 4), torch.zeros(4))
    unscaled = group_advantages(rewards, 4, scale=False)
    assert torch.equal(unscaled, torch.tensor([-2.0, -1.0, 0.0, 3.0]))


def test_the_clipped_loss_stops_what_has_gone_far_enough() -> None:
    torch.testing.assert_close(
        k3(torch.tensor(math.log(2.0)), torch.tensor(0.0)), torch.tensor(0.30685), atol=1e-5, rtol=0
    )
    old = torch.zeros(2, 2)
    new = torch.tensor([[1.5, 1.0], [1.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    clipped_surrogate(new, old, advantages, 0.2).loss.sum().backward()
    assert new.grad is not None
    # A good sample gains nothing beyond 1.2; a bad one is still pushed down there, not below 0.8.
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -1.0], [1.5, 0.0]]))


def test_a_bandit_learns_the_rewarded_token() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.2)
    for _ in range(60):
        tokens = torch.multinomial(logits.detach().softmax(-1), 16, replacement=True)
        new = logits.log_softmax(-1)[tokens][:, None]
        advantages = group_advantages((tokens == 1).float(), 16)
        optimizer.zero_grad()
        clipped_surrogate(new, new.detach(), advantages, 0.2).loss.mean().backward()
        optimizer.step()
    assert float(logits.detach().softmax(-1)[1]) > 0.99


def test_in_eval_mode_the_first_update_is_reinforce(source: str) -> None:
    method = VAPi(Brightness(), group_size=4, mode="eval", ce_weight=0.0, advantage_clip=None)
    model = aligned(source, method).model
    batch = batch_of(model)
    torch.manual_seed(3)
    made = method.terms(model, batch)
    assert float(made.logged["ratio_off"]) == 0.0
    assert float(made.losses["cross_entropy"].detach()) == 0.0
    assert abs(float(made.losses["policy"].detach())) < 1e-6
    made.losses["policy"].backward()
    ours = [p.grad.clone() for p in model.generator.parameters() if p.grad is not None]
    model.zero_grad()
    # Once more by hand: the same draws, minus A log p.
    torch.manual_seed(3)
    model.generator.eval()
    logits = model.generator.score(batch.tokens, batch.condition).logits
    noise = Noise(new_seeds(len(logits)))
    waits = [noise.exponential(*logits.shape[1:]) for _ in range(4)]
    samples = torch.stack([(logits.softmax(-1) / wait).argmax(-1) for wait in waits], 1)
    images = model.decode(samples.flatten(0, 1))
    advantages = group_advantages(images.flatten(1).mean(1), 4)
    new = torch.stack([Logits(logits).log_prob(tokens) for tokens in samples.unbind(1)], 1)
    (-advantages[:, None] * new.flatten(0, 1)).mean().backward()
    theirs = [p.grad for p in model.generator.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) and max(float(g.abs().max()) for g in ours) > 1e-4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_modes_differ_by_where_dropout_is_at_work(source: str) -> None:
    off = {}
    entropy = {}
    for dropout in (0.0, 0.3):
        for mode in ("eval", "train", "twice"):
            method = VAPi(group_size=3, mode=mode)
            model = aligned(source, method).model
            model.generator.conditioning.dropout = 0.0
            for part in model.generator.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = dropout
            torch.manual_seed(0)
            made = method.terms(model, batch_of(model))
            off[mode, dropout] = float(made.logged["ratio_off"])
            entropy[mode, dropout] = float(made.losses["cross_entropy"])
    assert off["eval", 0.3] == off["twice", 0.3] == 0.0 and off["train", 0.3] > 0.05
    assert off["train", 0.0] < 1e-5
    plain = entropy["eval", 0.0]
    assert entropy["eval", 0.3] == plain
    assert entropy["twice", 0.0] == pytest.approx(plain) == entropy["train", 0.0]
    assert abs(entropy["twice", 0.3] - plain) > 1e-4 and abs(entropy["train", 0.3] - plain) > 1e-4


def test_the_cross_entropy_asks_for_true_tokens_behind_noisy_ones(source: str) -> None:
    noise = ContextNoise(1.0, decay="constant", uniform=False)
    values = []
    for context_noise in (None, noise):
        method = VAPi(group_size=2, mode="eval", ce_weight=1.0, context_noise=context_noise)
        model = aligned(source, method).model
        model.generator.eval()
        batch = batch_of(model)
        torch.manual_seed(0)
        values.append(method.terms(model, batch).losses["cross_entropy"])
        truth = model.generator.score(batch.tokens, batch.condition).cross_entropy(batch.tokens)
        if context_noise is None:
            torch.testing.assert_close(values[0], truth)
    assert abs(float(values[0]) - float(values[1])) > 1e-3


def test_noise_replaces_as_many_tokens_as_it_says() -> None:
    layout = grid_layout(4, 4, Categorical(8))
    tokens = torch.zeros(2000, 16, dtype=torch.int64)
    torch.manual_seed(0)
    constant = partial(ContextNoise, decay="constant", uniform=False)
    inclusive = constant(0.5).corrupt(tokens, layout, 0.0)
    assert float((inclusive != 0).float().mean()) == pytest.approx(0.5 * 7 / 8, abs=0.01)
    exclusive = constant(0.5, exclude_true=True).corrupt(tokens, layout, 0.0)
    assert float((exclusive != 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    every = constant(1.0, exclude_true=True).corrupt(tokens + 5, layout, 0.0)
    counts = every.flatten().bincount(minlength=8)
    assert counts[5] == 0 and counts.max() - counts[counts > 0].min() < 500
    assert constant(0.0).corrupt(tokens, layout, 0.0) is tokens


def test_left_out_tokens_never_are_all() -> None:
    torch.manual_seed(0)
    each = torch.ones(50, 3) * torch.arange(1.0, 51.0)[:, None]
    torch.testing.assert_close(mean_of_kept(each, 1.0), each.mean())
    torch.testing.assert_close(mean_of_kept(each, 0.5), each.mean())
    assert torch.equal(mean_of_kept(each, 0.0), each.mean())


def test_values_in_generation_order_find_their_places() -> None:
    order = torch.stack([torch.randperm(9), torch.randperm(9)])
    entities = Entities(order, (1,) * 9)
    tokens = torch.arange(18).view(2, 9)
    assert torch.equal(ungenerated(tokens.gather(1, order), entities), tokens)


@pytest.mark.parametrize(
    "make_method",
    [
        lambda: VAPi(group_size=2, kl=0.1, token_dropout=0.5),
        lambda: GRPO([Brightness(), ReconstructionReward(weight=0.5)], group_size=2, kl=0.1),
        lambda: CCA(lam=10.0),
        lambda: StraightThrough(),
    ],
    ids=["va_pi", "grpo", "cca", "ste"],
)
def test_only_the_generator_changes(fit, source: str, make_method) -> None:
    method = make_method()
    module = aligned(source, method)
    model = module.model
    before = copies(module)
    _, losses = fit(module, 2, data=ShapesData(size=16, length=16, val_length=8, batch_size=4))
    moved = changed(before, module)
    assert all(math.isfinite(loss) for loss in losses)
    assert moved and all(name.startswith("model.generator.") for name in moved)
    assert not any(p.requires_grad for p in model.tokenizer.parameters())
    if method.needs_reference:
        assert method.reference is not None
        for name, tensor in method.reference.state_dict().items():
            assert torch.equal(tensor, before[f"model.generator.{name}"])


def test_the_decoder_alone_is_tuned_and_averaged(fit, source: str, tmp_path: Path) -> None:
    module = aligned(source, DecoderTuning())
    before = copies(module)
    batch = batch_of(module.model)
    trainer, _ = fit(module, 3, [EMA(0.9)], data=ShapesData(16, 16, 8, batch_size=4))
    moved = changed(before, module)
    assert moved and all(name.startswith("model.tokenizer.") for name in moved)
    assert not any("quantizer" in name or "encoder" in name for name in moved)
    assert torch.equal(module.model.encode(batch.data["image"]), batch.tokens)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    averaged = tessellar.load(tmp_path / "a.ckpt")
    assert isinstance(averaged, ImageGenerator)
    callback = next(c for c in trainer.callbacks if isinstance(c, EMA))
    for name, tensor in averaged.tokenizer.state_dict().items():
        assert torch.equal(tensor, callback.average[name].to(tensor.dtype))
    raw = tessellar.load(tmp_path / "a.ckpt", raw=True)
    assert changed(copies(averaged), raw)


def test_straight_through_shows_the_drawn_codes_and_reaches_the_generator(source: str) -> None:
    method = StraightThrough(choice="argmax", ce_weight=0.0)
    model = aligned(source, method).model
    model.generator.eval()
    batch = batch_of(model)
    logits = model.generator.score(batch.tokens, batch.condition).logits
    shown = model.tokenizer.decode(logits.argmax(-1))
    error = (shown - batch.data["image"]).square().mean()
    made = method.terms(model, batch)
    torch.testing.assert_close(made.losses["distance"], error)
    made.losses["distance"].backward()
    assert all(p.grad is not None for p in model.generator.layers.parameters())
    assert all(p.grad is None for p in model.tokenizer.parameters())


def test_cca_is_that_of_its_paper() -> None:
    def loss(own: float, other: float, lam: float, positive: bool = False) -> float:
        given = (torch.tensor([own]), torch.tensor([other]), torch.tensor([positive]))
        return float(contrastive_loss(*given, beta=0.02, lam=lam))

    assert loss(10, -5, 1000) == pytest.approx(0.644995, abs=1e-5)
    assert loss(0, 0, 1000) == pytest.approx(1001 * math.log(2) / 1000, abs=1e-5)
    assert loss(0, 0, 0.5) == pytest.approx(1.5 * math.log(2), abs=1e-5)
    other = torch.tensor([1.0], requires_grad=True)
    contrastive_loss(torch.zeros(1), other, torch.tensor([True]), beta=0.02, lam=9.0).backward()
    assert other.grad is not None and float(other.grad) < 0  # likelier is better
    a = Condition(ids=torch.tensor([1, 2, 3]))
    assert equal_rows(a, Condition(ids=torch.tensor([1, 0, 3]))).tolist() == [True, False, True]


def test_cca_begins_without_preference_and_contrasts_other_classes(source: str) -> None:
    method = CCA(lam=10.0, null_share=0.0, dropout=False)
    model = aligned(source, method).model
    batch = batch_of(model, 4)
    made = method.terms(model, batch)
    expected = torch.tensor(11 * math.log(2) / 10)
    torch.testing.assert_close(made.losses["contrastive"].detach(), expected)
    assert float(made.logged["own"]) == float(made.logged["other"]) == 0.0
    own, other, positive = method.pairs(model.generator, batch.condition)
    assert own.ids is not None and other.ids is not None
    assert other.ids.tolist() == own.ids.roll(1).tolist() and not positive.any()
    own, other, positive = CCA(null_share=1.0).pairs(model.generator, batch.condition)
    null = model.generator.null(batch.condition)
    assert own.ids.tolist() == other.ids.tolist() == null.ids.tolist() and positive.all()


def test_cca_learns_the_contrast(source: str) -> None:
    method = CCA(lam=1.0, null_share=0.0, dropout=False)
    model = aligned(source, method).model
    batch = batch_of(model)
    optimizer = torch.optim.Adam(method.parameters_of(model), 0.01)
    for _ in range(12):
        made = method.terms(model, batch)
        optimizer.zero_grad()
        made.losses["contrastive"].backward()
        optimizer.step()
    assert float(made.logged["own"]) > 1.0 and float(made.logged["other"]) < -1.0


def test_the_guided_policy_is_the_one_that_draws(source: str) -> None:
    guided = Sampling(guidance=Linear(3.0), choice=Choice(temperature=0.7, top_k=5))
    method = GRPO([Brightness()], guided, group_size=2)
    model = aligned(source, method).model.eval()
    batch = batch_of(model)
    tokens = model.sample_tokens(batch.condition, guided, [0, 1, 2, 3])
    state = model.generator.start(batch.condition, Guidance(Linear(3.0)))
    with torch.no_grad():
        predicted = model.generator.predict(state, tokens, count=16)
        expected = guided.choice.probs(predicted.logits).log()
        found = method.log_probs(model.generator, tokens, batch.condition)
    expected = expected.gather(-1, tokens[..., None])[..., 0]
    assert bool(torch.isfinite(expected).all())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    plain = GRPO([Brightness()], guided, group_size=2, guided=False, filtered=False)
    with torch.no_grad():
        scores = model.generator.score(tokens, batch.condition).logits / 0.7
        found = plain.log_probs(model.generator, tokens, batch.condition)
    torch.testing.assert_close(found, Logits(scores).log_prob(tokens))


def test_rewards_have_advantages_of_their_own(source: str) -> None:
    rewards = [Brightness(weight=2.0), ReconstructionReward()]
    method = GRPO(rewards, group_size=4)
    model = aligned(source, method).model
    batch = batch_of(model, 2)
    tokens = torch.randint(16, (8, 16), generator=torch.Generator().manual_seed(0))
    values, advantages = method.judged(model, batch, tokens)
    images = model.decode(tokens)
    originals = batch.images.repeat_interleave(4, 0)
    errors = -(images - originals).square().flatten(1).mean(1)
    torch.testing.assert_close(values, torch.stack([images.flatten(1).mean(1), errors]))
    expected = 2 * group_advantages(values[0], 4, 1e-4) + group_advantages(errors, 4, 1e-4)
    torch.testing.assert_close(advantages, expected)
    rows = repeated({"label": torch.tensor([1, 2]), "caption": ["a", "b"]}, 2)
    assert rows["label"].tolist() == [1, 1, 2, 2] and rows["caption"] == ["a", "a", "b", "b"]


def frechet(mode: str, decay: float = 0.5) -> LeaveOneOutFrechet:
    """Of one feature, against mean 0 and deviation 1."""
    network = SimpleNamespace(pooled_dim=1, file=None)
    reward = LeaveOneOutFrechet.__new__(LeaveOneOutFrechet)
    Reward.__init__(reward)
    reward.mode = mode
    reward.decay = decay
    for name in ("real_mean", "real_deviation", "mean", "square"):
        reward.register_buffer(name, torch.zeros(network.pooled_dim, dtype=torch.float64))
    reward.register_buffer("prepared", torch.tensor(False))
    reward.set_reference(torch.zeros(1).double(), torch.ones(1).double())
    reward.square.fill_(1.0)
    return reward


FEATURES = torch.tensor([[-1.0], [1.0], [3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("loo_batch", [2.59932, 0.59932, -1.40068]),
        ("ema_loo", [0.72499, 0.23679, -0.44658]),
        ("ema_scalar", [-0.44658] * 3),
    ],
)
def test_leaving_one_out_tells_what_it_brought(mode: str, expected: list[float]) -> None:
    reward = frechet(mode)
    found = reward.of_features(FEATURES)
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-5, rtol=0)
    if mode == "ema_scalar":
        assert torch.equal(group_advantages(found, 3), torch.zeros(3).double())
    taken_in = mode != "loo_batch"
    assert float(reward.mean) == (0.5 if taken_in else 0.0)


def test_two_processes_leave_out_as_one(monkeypatch) -> None:
    other = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    whole = frechet("ema_loo").of_features(torch.cat([FEATURES, other]))
    sums = iter([torch.tensor(2), other.sum(0), other.square().sum(0)])
    module = "tessellar.training.alignment.leave_one_out.distributed"
    monkeypatch.setattr(f"{module}.all_reduce_sum", lambda x: x + next(sums))
    torch.testing.assert_close(frechet("ema_loo").of_features(FEATURES), whole[:3])
    monkeypatch.undo()
    with pytest.raises(UserError, match="at least 2 images"):
        frechet("loo_batch").of_features(FEATURES[:1])


def teacher_file(path: Path, classes: int = 10, names: tuple[str, ...] = ()) -> str:
    facts = NetworkFacts(
        "tiny", "test_resnet", classes, (16, 16), purpose="teacher", class_names=names
    )
    import timm

    network = timm.create_model("test_resnet", num_classes=classes)
    write_safetensors(network.state_dict(), path, facts.to_metadata())
    return str(path)


def test_a_classifier_and_a_distribution_reward_a_run_exactly_resumed(
    fit, source: str, tmp_path: Path
) -> None:
    """Stopped inside an update, with averages, a reference and moving moments."""
    weights = teacher_file(tmp_path / "teacher.safetensors")

    def run(folder: Path | None = None, start: str = source, **options: Any):
        network = VisionModel(weights=weights)
        rewards: list[Reward] = [
            ClassifierReward(weights),
            LeaveOneOutFrechet(network, real=20, own=8),
        ]
        module = aligned(start, GRPO(rewards, group_size=2, kl=0.1), accumulate=2)
        ema, drawing = EMA(0.9), Drawing()
        data = ShapesData(size=16, length=24, val_length=8, batch_size=4)
        saving: list[L.Callback] = [] if folder is None else [SaveAll(folder)]
        trainer, losses = fit(module, 3, [ema, drawing, *saving], data=data, **options)
        return everything(module, trainer, ema, drawing), losses

    whole, losses = run(tmp_path)
    for batch in (3, 4):
        path = tmp_path / f"batch_{batch}.ckpt"
        resumed, rest = run(start=str(path), ckpt_path=path)
        assert rest == losses[batch:] and differences(whole, resumed) == []
    names = set(whole["weights"])
    assert any("method.reference" in name for name in names)
    assert not any("network" in name for name in names)  # rewards' networks are in no checkpoint
    assert float(whole["weights"]["method.all_rewards.1.mean"].abs().sum()) > 0


def test_several_updates_are_made_by_one_roll_out(source: str) -> None:
    method = GRPO([Brightness()], group_size=4, passes=2)
    model = aligned(source, method).model
    first = batch_of(model, 2)
    torch.manual_seed(3)
    one = method.terms(model, first)
    assert float(one.logged["ratio_off"]) == 0.0
    assert abs(float(one.losses["policy"].detach())) < 1e-6
    other = method.terms(model, batch_of(model, 2)._replace(part=1))  # a part has its own roll-out
    assert not torch.equal(one.logged["reward"], other.logged["reward"])
    one.losses["policy"].backward()
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter -= 0.5 * parameter.grad if parameter.grad is not None else 0.0
    again = method.terms(model, batch_of(model, 3)._replace(update=1))
    assert torch.equal(again.logged["reward"], one.logged["reward"])  # nothing was drawn
    assert float(again.logged["ratio_off"]) > 1e-3
    assert float(again.losses["policy"].detach()) < 0  # the surrogate was raised
    anew = method.terms(model, first._replace(update=2))
    assert float(anew.logged["ratio_off"]) == 0.0
    assert not torch.equal(anew.logged["reward"], one.logged["reward"])


def test_a_run_stopped_between_passes_resumes_exactly(fit, source: str, tmp_path: Path) -> None:
    def run(folder: Path | None = None, **options: Any):
        module = aligned(source, GRPO([Brightness()], group_size=2, passes=3), accumulate=2)
        ema, drawing = EMA(0.9), Drawing()
        saving: list[L.Callback] = [] if folder is None else [SaveAll(folder)]
        trainer, losses = fit(module, 4, [ema, drawing, *saving], **options)
        return everything(module, trainer, ema, drawing), losses

    whole, losses = run(tmp_path)
    for batch in (3, 4, 6):
        resumed, rest = run(ckpt_path=tmp_path / f"batch_{batch}.ckpt")
        assert rest == losses[batch:] and differences(whole, resumed) == []
    kept = torch.load(tmp_path / "batch_4.ckpt", weights_only=True)["alignment_method"]
    assert [sorted(of_one) for of_one in kept] == [["0", "1"]]


def test_va_pi_resumes_exactly_and_raises_its_reward(fit, source: str, tmp_path: Path) -> None:
    def run(folder: Path | None = None, **options: Any):
        module = aligned(source, VAPi(Brightness(), group_size=4, ce_weight=0.0))
        ema, drawing = EMA(0.9), Drawing()
        rewards: list[float] = []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                rewards.append(float(trainer.callback_metrics["train/reward"]))

        saving: list[L.Callback] = [] if folder is None else [SaveAll(folder)]
        made = [ema, drawing, Watch(), *saving]
        trainer, losses = fit(module, 16, made, log_every_n_steps=1, **options)
        return everything(module, trainer, ema, drawing), losses, rewards

    whole, losses, rewards = run(tmp_path)
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.02
    resumed, rest, _ = run(ckpt_path=tmp_path / "batch_14.ckpt")
    assert rest == losses[14:] and differences(whole, resumed) == []


def test_the_classifier_finds_classes_by_their_names(tmp_path: Path) -> None:
    weights = teacher_file(tmp_path / "teacher.safetensors", 3, ("ring", "star", "cross"))
    reward = ClassifierReward(weights)
    drawn = Drawn(torch.rand(3, 3, 20, 20) * 2 - 1, None, {"label": torch.tensor([0, 1, 2])})
    logits = reward.network(drawn.images).log_softmax(-1)
    torch.testing.assert_close(reward(drawn), logits.diagonal())

    def known(*names: str) -> Material:
        return Material(names, lambda _: iter(()), lambda _: iter(()))

    reward.prepare(known("star", "cross", "ring"))
    rows = torch.arange(3)
    torch.testing.assert_close(reward(drawn), logits[rows, [1, 2, 0]])
    with pytest.raises(UserError, match="'moon' is no class of .*teacher"):
        reward.prepare(known("star", "moon", "ring"))
    match = ClassifierReward(weights, match=True)
    assert torch.equal(match(drawn), (logits.argmax(-1) == rows).float())
    with pytest.raises(UserError, match="this data has none"):
        match(drawn._replace(batch={}))


def test_captions_are_scored_by_clip(clip: str) -> None:  # noqa: F811
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    reward = CLIPScore(clip)
    found = reward(Drawn(images, None, {"caption": ["red cat", "a photo of red"]}))
    alone = reward(Drawn(images[1:], None, {"caption": ["a photo of red"]}))
    assert found.shape == (2,) and float(found.min()) >= 0
    assert float(found.max()) <= 2.5
    assert alone.shape == (1,) and not list(reward.state_dict())
    with pytest.raises(UserError, match="this data has none"):
        reward(Drawn(images, None, {}))


def test_a_network_that_measures_the_run_gives_no_reward(
    fit, source: str, tmp_path: Path, monkeypatch
) -> None:
    weights = teacher_file(tmp_path / "teacher.safetensors")

    class Judge(L.Callback):
        extractor_source = weights

    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(weights).read_bytes())
    module = aligned(source, GRPO([ClassifierReward(str(copy))], group_size=2))
    with pytest.raises(
        UserError, match="asks the network .*copy.* with which this run is measured"
    ):
        fit(module, 1, [Judge()])
    facts = NetworkFacts("tiny", "test_resnet", 10, (16, 16))
    state = tessellar.tensor_files.read_safetensors(copy)[0]
    write_safetensors(state, tmp_path / "judge.safetensors", facts.to_metadata())
    with pytest.raises(UserError, match="is a network for evaluation"):
        ClassifierReward(str(tmp_path / "judge.safetensors"))
    torch.save(state, tmp_path / "inception.pth")
    monkeypatch.setattr(networks, "INCEPTION", networks.sha256_of(tmp_path / "inception.pth"))
    with pytest.raises(UserError, match="inception.pth is a network for evaluation"):
        VisionModel("test_resnet", str(tmp_path / "inception.pth"))


def test_what_cannot_be_aligned_says_so(fit, source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give at least 2"):
        VAPi(group_size=1)
    with pytest.raises(UserError, match="greedy policy"):
        GRPO([Brightness()], Sampling(choice=Choice(temperature=0)))
    with pytest.raises(UserError, match="at least one reward"):
        GRPO([])
    model = make_generator_module().model
    with pytest.raises(UserError, match="no likelihood of whole images"):
        CCA().attach(SimpleNamespace(generator=object()))  # type: ignore[arg-type]
    tokens = {"tokens": torch.zeros(1, 16, dtype=torch.int64)}
    with pytest.raises(UserError, match="cached tokens alone"):
        _ = Batch(tokens["tokens"], Condition(), tokens, 0.0).images
    names = tuple(f"class {number}" for number in range(10))
    model.class_names = names
    other = export_generator(model, tmp_path / "other")
    with pytest.raises(UserError, match="alignment keeps them"):
        aligned(str(other), CCA()).check_data(ShapesData(size=16, length=8, val_length=8))

"""xAR: cached = uncached sampling for every X, causality, noisy context, both solvers' inputs, presets, bad input."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers import kv_cache
from tessellar.models.xar import XAR, xar_b, xar_h, xar_l
from tessellar.models.xar import model as xar
from tessellar.processes import flow
from tessellar.processes.flow import Euler, EulerMaruyama, Flow
from tessellar.protocol.condition import Condition, cat
from tessellar.protocol.entities import Entities, random_order
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Linear
from tessellar.protocol.layout import (
    Categorical,
    Continuous,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral, decode_from
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi

GRID = grid_layout(4, 4, Continuous(3))
PYRAMID = Layout(tuple(Segment((side, side), Continuous(3)) for side in (1, 2, 4)))
EVERY_X = [
    "token",
    "cell:2",
    "cell:1x2",
    "subsample:2",
    "image",
    "level:1,3,4,8",
    "random:5",
    "scale",
]
GUIDANCES = {"plain": NO_GUIDANCE, "ramp": Guidance(Linear(2.5))}
FEW = EulerMaruyama(3)
DRAWS = Sampling(flow=FEW)


def model(entity: str = "cell:2", **options: Any) -> XAR:
    torch.manual_seed(0)
    layout = PYRAMID if entity == "scale" else GRID
    generator = XAR(layout, entity, 24, 2, 2, 5, dropout=0.0, **options)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return generator.eval()


def labels(batch: int) -> Condition:
    return Condition(ids=torch.arange(batch) % 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(
    generator: XAR, batch: int, guidance: Guidance = NO_GUIDANCE, sampler: Flow = FEW
) -> Tensor:
    return Ancestral()(
        generator, labels(batch), Sampling(flow=sampler), Noise(range(batch)), guidance
    )


@torch.no_grad()
def uncached(generator: XAR, batch: int, guidance: Guidance, sampler: Flow) -> Tensor:
    """The same draws from whole training passes: clean entities at time 0, the current one, junk behind it."""
    entities, noise = generator.entities, Noise(range(batch))
    condition = labels(batch)
    rows = condition if guidance.schedule is None else cat([condition, generator.null(condition)])
    tokens = generator.layout.blank(batch)
    for n in range(entities.count):
        start, stop = entities.ends[n : n + 2].tolist()
        number = torch.full((batch, stop - start), n)

        def velocity(
            x: Tensor, t: Tensor, n=n, start=start, stop=stop, number=number, known=tokens
        ) -> Tensor:
            sequence = generator.in_order(known)
            sequence[:, start:stop] = x.float()
            sequence[:, stop:] = 9.0
            times = torch.zeros(1, entities.count)
            times[0, n] = t
            both = generator.velocity(sequence.repeat(guidance.branches, 1, 1), times, rows)[
                :, start:stop
            ]
            return guidance.merge(both, number, entities)

        drawn = sampler.integrate(velocity, (stop - start, 3), noise, n, entities.count)
        tokens = entities.put(tokens, torch.full((batch,), n), 1, drawn)
    return tokens


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("entity", EVERY_X)
def test_cached_equals_uncached(entity: str, batch: int, guidance: str) -> None:
    generator = model(entity)
    ours = sample(generator, batch, GUIDANCES[guidance])
    assert float(ours.abs().max()) > 0.5
    torch.testing.assert_close(
        ours, uncached(generator, batch, GUIDANCES[guidance], FEW), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("sampler", [Euler(4), EulerMaruyama(4, last_steps=2)])
def test_other_samplers_too(sampler: Flow) -> None:
    generator, guidance = model(), GUIDANCES["ramp"]
    ours = sample(generator, 2, guidance, sampler)
    torch.testing.assert_close(ours, uncached(generator, 2, guidance, sampler), atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_image_may_have_its_own_order() -> None:
    generator, orders = (
        model("token"),
        random_order(GRID, torch.Generator().manual_seed(3), batch=2),
    )
    for b in range(2):
        state = generator.start(labels(2), entities=orders)
        together = [
            step.tokens
            for step in decode_from(generator, state, DRAWS, Noise([0, 1]), GRID.blank(2))
        ][-1]
        alone_order = Entities(orders.order[b], orders.sizes)
        state = generator.start(labels(2).select(torch.tensor([b])), entities=alone_order)
        alone = [
            step.tokens for step in decode_from(generator, state, DRAWS, Noise([b]), GRID.blank(1))
        ][-1]
        torch.testing.assert_close(together[b], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("entity", ["token", "cell:2", "level:1,3,4,8", "scale"])
@torch.no_grad()
def test_an_entity_sees_itself_and_those_before(entity: str) -> None:
    generator, ends = model(entity), model(entity).entities.ends
    count = generator.entities.count
    x, t = normal(2, generator.layout.length, 3), flow.logit_normal(2, count)
    before = generator.velocity(x, t, labels(2))
    for m in range(count):
        changed = x.clone()
        changed[:, ends[m]] += 1.0  # one token of entity m
        same = (generator.velocity(changed, t, labels(2)) == before).all(-1)
        assert bool(same[:, : ends[m]].all()) and not bool(same[:, ends[m] :].any())
        late = t.clone()
        late[:, m] = 1 - late[:, m]
        same = (generator.velocity(x, late, labels(2)) == before).all(-1)
        assert bool(same[:, : ends[m]].all()) and not bool(same[:, ends[m] :].any())


@torch.no_grad()
def test_first_entities_alone_give_the_same() -> None:
    generator, x, t = model("level:1,3,4,8"), normal(2, 16, 3), flow.logit_normal(2, 4)
    whole = generator.velocity(x, t, labels(2))
    generator.entities = Entities(torch.arange(8), (1, 3, 4))
    torch.testing.assert_close(
        generator.velocity(x[:, :8], t[:, :3], labels(2)), whole[:, :8], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("entity", ["cell:2", "level:1,3,4,8"])
@torch.no_grad()
def test_clean_context_is_what_sampling_sees(entity: str) -> None:
    """Two streams: entity n of the noisy one equals a pass with clean entities before it, at time 0."""
    generator = model(entity, context_noise="clean")
    clean, noisy, t = (
        normal(2, 16, 3),
        normal(2, 16, 3, seed=1),
        flow.logit_normal(2, generator.entities.count),
    )
    both = generator.velocity(noisy, t, labels(2), clean)
    for n in range(generator.entities.count):
        start, stop = generator.entities.ends[n : n + 2].tolist()
        mixed = torch.cat([clean[:, :start], noisy[:, start:]], 1)
        times = torch.cat([torch.zeros(2, n), t[:, n:]], 1)
        expected = generator.velocity(mixed, times, labels(2))[:, start:stop]
        torch.testing.assert_close(both[:, start:stop], expected, atol=1e-5, rtol=0)


def test_orders_of_context_noise() -> None:
    steps = {
        mode: model(context_noise=mode).draw_times(64).diff(dim=1)
        for mode in ("increasing", "decreasing")
    }
    assert bool((steps["increasing"] > 0).all()) and bool((steps["decreasing"] < 0).all())
    t = model().draw_times(4000)
    assert t.shape == (4000, 4) and bool(((t > 0) & (t < 1)).all())
    logits = t.logit()
    assert abs(float(logits.mean())) < 0.05 and abs(float(logits.std()) - 1) < 0.05
    assert float(torch.corrcoef(t.T).triu(1).abs().max()) < 0.1


@torch.no_grad()
def test_loss_of_a_zero_prediction() -> None:
    generator, tokens, noise = (
        model("level:1,3,4,8", context_noise="clean"),
        normal(3, 16, 3),
        normal(3, 16, 3, seed=1),
    )
    for parameter in generator.output.parameters():
        torch.nn.init.zeros_(parameter)
    error, t = (noise - tokens).square(), torch.rand(3, 4)
    torch.testing.assert_close(generator.flow_loss(tokens, labels(3), t, noise), error.mean())
    weighted = generator.flow_loss(tokens, labels(3), t, noise, torch.tensor([1.0, 0.0, 3.0]))
    torch.testing.assert_close(
        weighted, (error.mean((1, 2)) * torch.tensor([1.0, 0.0, 3.0])).sum() / 4
    )
    generator.loss_over = "entities"
    parts = error.mean(-1).split([1, 3, 4, 8], dim=1)
    expected = torch.stack([part.mean(1) for part in parts]).mean()
    torch.testing.assert_close(generator.flow_loss(tokens, labels(3), t, noise), expected)


def test_dropped_labels_do_not_matter() -> None:
    generator, tokens = model(condition_dropout=1.0).train(), normal(2, 16, 3)
    losses = []
    for ids in ([0, 1], [3, 2]):
        torch.manual_seed(4)
        losses.append(generator.loss(tokens, Condition(ids=torch.tensor(ids)))["flow"])
    assert torch.equal(*losses)
    generator.conditioning.dropout = 0.0
    torch.manual_seed(4)
    assert not torch.equal(generator.loss(tokens, labels(2))["flow"], losses[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(checkpointing: bool) -> None:
    generator = model("subsample:2", context_noise="clean").train()
    generator.activation_checkpointing = checkpointing
    generator.loss(normal(4, 16, 3), labels(4))["flow"].backward()
    without = [
        n for n, p in generator.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not without


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_compiled_masks_change_nothing() -> None:
    """The FlexAttention mask, run eagerly, against the dense one."""
    dense, blocks = model(), model(attention="flex")
    x, t = normal(2, 16, 3), flow.logit_normal(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            blocks.velocity(x, t, labels(2)), dense.velocity(x, t, labels(2)), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("guidance", GUIDANCES)
@torch.no_grad()
def test_given_entities_are_kept_and_read_at_once(guidance: str) -> None:
    """In-painting: the rest follows from the given tokens as if they had been drawn."""
    generator = model()
    whole = sample(generator, 2, GUIDANCES[guidance])
    noise = Noise(range(2))
    for _ in range(2 * FEW.steps):  # what the first two entities took
        noise.normal(4, 3)
    state = generator.start(labels(2), GUIDANCES[guidance])
    given = generator.entities.put(
        GRID.blank(2), torch.zeros(2).long(), 2, generator.in_order(whole)[:, :8]
    )
    rest = [step.tokens for step in decode_from(generator, state, DRAWS, noise, given, first=2)][-1]
    torch.testing.assert_close(rest, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rolled_back_state_gives_the_same_again() -> None:
    generator, tokens = model(), normal(2, 16, 3)
    state = generator.start(labels(2), GUIDANCES["ramp"])
    for _ in range(3):
        last = generator.predict(state, tokens)
    first = last.sample(DRAWS, Noise([0, 1]))
    generator.predict(state, tokens)
    state.rollback(torch.tensor([2, 2]))
    again = generator.predict(state, tokens).sample(DRAWS, Noise([0, 1]))
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)


@torch.no_grad()
def test_guidance_of_one_is_the_conditional_branch_alone() -> None:
    torch.testing.assert_close(
        sample(model(), 2, Guidance(Constant(1.0))), sample(model(), 2), atol=1e-5, rtol=0
    )
    guided = sample(model(), 2, Guidance(Linear(3.0)))
    ours, plain = (model().in_order(x)[:, :4] for x in (guided, sample(model(), 2)))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)  # the ramp starts at 1
    assert not torch.allclose(guided, sample(model(), 2), atol=1e-3)
    assert not torch.allclose(
        sample(model("image"), 2, Guidance(Linear(3.0))), sample(model("image"), 2), atol=1e-3
    )


def test_memory_of_sampling_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch makes one cache of its own size, and none of the earlier ones is alive."""
    made: list[tuple[weakref.ref, int]] = []

    def counted(*sizes: Any, **kinds: Any) -> kv_cache.KVCache:
        assert not any(ref() is not None for ref, _ in made)
        cache = kv_cache.KVCache(*sizes, **kinds)
        made.append((weakref.ref(cache), cache.data.numel()))
        return cache

    monkeypatch.setattr(xar, "KVCache", counted)
    generator, sampling = model(), DRAWS
    for first in range(4):
        sampling.tokens(generator, labels(2), [first, first + 1])
    assert len(made) == 4 and len({size for _, size in made}) == 1
    assert made[0][1] == 4 * 2 * 2 * 2 * (16 + 4) * 12


def test_calls_of_the_solver_are_counted_as_time_in_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator, clock = model("cell:2"), [0.0]
    run = generator._run

    def slow(*args: Any, **named: Any) -> Tensor:
        clock[0] += 1.0
        return run(*args, **named)

    monkeypatch.setattr(generator, "_run", slow)
    monkeypatch.setattr("tessellar.sampling.report._now", lambda _: clock[0])
    recorder = Recorder()
    Ancestral()(generator, labels(3), DRAWS, Noise(range(3)), recorder=recorder)
    report = recorder.report()
    assert report.evaluations == 3 * 4 and report.solver_evaluations == 3 * 4 * 3
    assert report.seconds == report.network_seconds == 4 * 3 + 3  # the last entity is not fed
    assert "12.0 evaluations of the solver an image" in str(report)


def test_times_are_truncated() -> None:
    assert xar.time_index(torch.tensor([0.0, 0.0399, 0.6159, 1.0])).tolist() == [0, 39, 615, 1000]


@pytest.mark.parametrize(
    "preset, count",
    [(xar_b, 172_638_224), (xar_l, 608_397_968), (xar_h, 1_186_024_096)],
    ids=["b", "l", "h"],
)
def test_parameter_counts_of_the_published_variants(
    preset: Callable[[Layout], XAR], count: int
) -> None:
    with torch.device("meta"):
        generator = preset(grid_layout(16, 16, Continuous(16)))
    assert sum(p.numel() for p in generator.parameters()) == count


def test_coordinates_of_scales_meet_on_the_finest_grid() -> None:
    rows, columns = xar.coordinates(PYRAMID)
    assert rows.tolist()[:5] == [1.5, 0.5, 0.5, 2.5, 2.5] and columns.tolist()[:5] == [
        1.5,
        0.5,
        2.5,
        0.5,
        2.5,
    ]
    assert (
        rows[5:].tolist() == [r for r in range(4) for _ in range(4)]
        and columns[5:].tolist() == [0, 1, 2, 3] * 4
    )
    rows, columns = xar.coordinates(sequence_layout(3, Continuous(2)))
    assert rows.tolist() == [0, 1, 2] and columns.tolist() == [0, 0, 0]


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="continuous"):
        XAR(grid_layout(4, 4, Categorical(8)), "token", 24, 1, 2)
    with pytest.raises(UserError, match="do not divide"):
        XAR(GRID, "cell:8x8", 24, 1, 2)
    with pytest.raises(UserError, match="FlexAttention"):
        XAR(GRID, "token", 24, 1, 2, attention="flex")
    with pytest.raises(UserError, match="one entity at a time"):
        model().predict(model().start(labels(1)), GRID.blank(1), count=2)
    with pytest.raises(UserError, match="categorical"):
        Sampling(algorithm=SpeculativeJacobi()).tokens(model(), labels(1), [0])

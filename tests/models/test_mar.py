"""MAR's own promises: masked values are unseen, the loss is a masked mean, sets cover everything once, own orders."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.mar import MAR, mar_b, mar_h, mar_l
from tessellar.models.mar.official import from_official, to_official
from tessellar.models.parts.random_sets import planned_sizes
from tessellar.processes.diffusion import (
    AncestralDiffusion,
    cosine_betas,
    full_process,
    kept_steps,
    respaced,
    strided_steps,
)
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Guidance, Revealed
from tessellar.protocol.layout import Categorical, Continuous, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.settings import Sampling

GRID = grid_layout(4, 4, Continuous(3))
LABELS = Condition(ids=torch.tensor([0, 3]))
FAST = AncestralDiffusion(steps=4)


def model(patch: int = 1, scale: float = 0.2) -> MAR:
    torch.manual_seed(0)
    generator = MAR(
        GRID,
        16,
        2,
        2,
        24,
        20,
        2,
        5,
        patch,
        3,
        condition_dropout=0.0,
        dropout=0.0,
        repeats=2,
        steps=4,
    )
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return generator.eval()


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_values_of_masked_tokens_are_not_seen(patch: int) -> None:
    generator = model(patch)
    masked = torch.arange(generator.length).expand(2, -1) % 2 == 0
    one, other = generator.to_patches(latents()), generator.to_patches(latents(1))
    mixed = torch.where(masked[..., None], other, one)
    z = generator.backbone(one, ~masked, LABELS)
    torch.testing.assert_close(z, generator.backbone(mixed, ~masked, LABELS))
    assert not torch.allclose(z, generator.backbone(other, ~masked, LABELS))


@pytest.mark.parametrize("patch", [1, 2])
def test_only_masked_tokens_and_weighed_samples_count(patch: int) -> None:
    generator, tokens = model(patch), latents()
    count = generator.repeats * 2 * generator.length
    t, noise = torch.arange(count) * 7 % 1000, torch.randn(count, generator.channels)
    masked = torch.zeros(2, generator.length, dtype=torch.bool)
    masked[:, 1:3] = True
    loss = generator.masked_loss(tokens, masked, LABELS, t, noise)
    z = generator.backbone(generator.to_patches(tokens), ~masked, LABELS)
    rows = [x.flatten(0, 1).repeat(2, 1) for x in (generator.to_patches(tokens), z)]
    chosen = masked.flatten().repeat(2)
    each = generator.row_losses(rows[0], rows[1], t, noise)
    torch.testing.assert_close(loss, each[chosen].mean())
    alone = generator.masked_loss(tokens, masked, LABELS, t, noise, torch.tensor([0.0, 3.0]))
    second = torch.arange(2).repeat_interleave(generator.length).repeat(2) == 1
    torch.testing.assert_close(alone, each[chosen & second].mean())


def test_training_reaches_every_parameter() -> None:
    generator = model().train()
    generator.conditioning.dropout = 0.5
    sum(
        generator.loss(latents().repeat(8, 1, 1), Condition(ids=torch.arange(16) % 5)).values()
    ).backward()  # type: ignore[union-attr]
    assert [
        n for n, p in generator.named_parameters() if p.grad is None or not bool(p.grad.any())
    ] == []


@pytest.mark.parametrize(("patches", "steps"), [(256, 64), (256, 256), (64, 10), (16, 1), (9, 9)])
def test_sets_cover_everything_once(patches: int, steps: int) -> None:
    sizes = planned_sizes(patches, steps)
    assert sum(sizes) == patches and min(sizes) >= 1 and len(sizes) == steps


@pytest.mark.parametrize("patch", [1, 2])
def test_each_image_has_an_order_of_its_own(patch: int) -> None:
    generator = model(patch)
    entities = generator.plan(Noise([0, 1, 2]), 3)
    assert torch.equal(entities.order.sort(1).values, torch.arange(16).expand(3, -1))
    assert not torch.equal(entities.order[0], entities.order[1])
    assert torch.equal(entities.order[2:], generator.plan(Noise([2]), 3).order)
    area = patch**2
    corners = entities.order.view(3, -1, area)
    assert bool((corners.diff(dim=2) > 0).all()) and sum(entities.sizes) == 16


@pytest.mark.parametrize("patch", [1, 2])
def test_an_image_depends_on_its_own_seed(patch: int) -> None:
    # Unclipped latents of 60,000 grow roundings, which differ by the number of rows: none in float64.
    generator = model(patch).double()
    sampling = Sampling(Revealed(2.0), algorithm=Ancestral(3), diffusion=FAST)
    together = sampling.tokens(generator, LABELS, [5, 6])
    alone = sampling.tokens(generator, LABELS.select(torch.tensor([1])), [6])
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-6)
    assert together.shape == (2, 16, 3) and bool(together.isfinite().all())
    assert not torch.allclose(together, sampling.tokens(generator, LABELS, [7, 8]))


@torch.no_grad()
def test_guidance_moves_the_noise_and_not_the_variance() -> None:
    generator, entities = model(), model().plan(Noise([0, 1]), 2)
    x, t = torch.randn(2, entities.sizes[0], 3), torch.tensor(300.0)
    plain = generator.predict(generator.start(LABELS, entities=entities), GRID.blank(2))
    guided = generator.predict(
        generator.start(LABELS, Guidance(Revealed(3.0)), entities), GRID.blank(2)
    )
    (eps, v), (eps_guided, v_guided) = (d.model(x, t).chunk(2, -1) for d in (plain, guided))  # type: ignore[attr-defined]
    torch.testing.assert_close(v, v_guided, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(eps, eps_guided)


def test_schedules_of_guidance() -> None:
    entities = model().sets(torch.arange(16), 4)
    scale = Revealed(3.0)(torch.arange(entities.count)[None], entities)[0]
    known = torch.tensor(entities.sizes).cumsum(0).clamp(max=15)
    torch.testing.assert_close(scale, 1 + 2 * known / 16)


def test_variance_between_posterior_and_beta() -> None:
    process, t = full_process(), torch.tensor([5, 500])
    one = torch.ones(2, 1)
    torch.testing.assert_close(process.log_variance(one, t)[:, 0].exp(), process.betas[t].float())
    torch.testing.assert_close(
        process.log_variance(-one, t)[:, 0].exp(), process.posterior_variance[t].float()
    )
    assert float(process.survival[-1]) < 3e-9 and float(cosine_betas().max()) <= 0.999


def test_respaced_processes() -> None:
    steps = kept_steps(100)
    assert (
        steps[:4] == [0, 10, 20, 30]
        and steps[-1] == 999
        and strided_steps(8) == list(range(0, 1000, 125))
    )
    process = respaced(full_process(), steps)
    torch.testing.assert_close(process.survival, full_process().survival[steps])
    assert bool(((process.betas > 0) & (process.betas <= 1)).all())
    with pytest.raises(UserError, match="0 diffusion steps; give 1 to 1000"):
        kept_steps(0)


def test_steps_may_be_annealed() -> None:
    sampler = AncestralDiffusion(50, last_steps=5)
    assert [sampler.steps_of(n, 10) for n in (0, 9)] == [50, 5]
    with pytest.raises(UserError, match="diffusion steps is"):
        AncestralDiffusion(1)


def test_without_temperature_the_start_decides() -> None:
    generator = model()
    sampler = AncestralDiffusion(4, temperature=0.0)
    one, other = (Sampling(diffusion=sampler).tokens(generator, LABELS, [5, 6]) for _ in range(2))
    assert torch.equal(one, other)


def test_a_head_that_has_learnt_little_needs_its_data_clipped() -> None:
    def slightly_wrong(x: Tensor, t: Tensor) -> Tensor:
        # The noise but for 3 % of it, as a head predicts it at the first step; and no head predicts
        # more noise than it has ever seen.
        return torch.cat([0.97 * x.clamp(-3, 3), torch.zeros_like(x)], -1)

    bare = AncestralDiffusion(25).integrate(slightly_wrong, (64, 4), Noise([0]))
    kept = AncestralDiffusion(25, clip=2.0).integrate(slightly_wrong, (64, 4), Noise([0]))
    assert float(bare.abs().max()) > 10 > 2.0 >= float(kept.abs().max())
    loose = AncestralDiffusion(25, clip=1e9).integrate(slightly_wrong, (64, 4), Noise([0]))
    assert torch.equal(bare, loose)
    with pytest.raises(UserError, match="diffusion clip is 0"):
        AncestralDiffusion(clip=0)


def test_settings_without_a_clip_are_described_as_they_were() -> None:
    assert "clip" not in Sampling().describe()["diffusion"]["init_args"]
    sampling = Sampling(diffusion=AncestralDiffusion(clip=4.0))
    assert sampling.describe()["diffusion"]["init_args"]["clip"] == 4.0


@pytest.mark.parametrize(
    ("preset", "count"), [(mar_b, 207_924_768), (mar_l, 478_326_304), (mar_h, 942_403_104)]
)
def test_published_sizes(preset: Any, count: int) -> None:
    with torch.device("meta"):
        generator = preset(grid_layout(16, 16, Continuous(16)))
    assert sum(p.numel() for p in generator.parameters()) == count


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="MAR generates one grid of continuous latents"):
        MAR(grid_layout(4, 4, Categorical(8)), 16, 1, 2)
    with pytest.raises(UserError, match="17 steps for 16 tokens; give 1 to 16"):
        Sampling(algorithm=Ancestral(17)).tokens(model(), LABELS, [0, 1])
    official = to_official(model())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            from_official(official, GRID, 2).parameters(), model().parameters(), strict=True
        )
    )
    with pytest.raises(
        UserError, match="is for 16 tokens of 3 channels, but the tokenizer gives 8x8"
    ):
        from_official(official, grid_layout(8, 8, Continuous(3)), 2)

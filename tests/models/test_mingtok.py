"""Ming-UniVision's generator: features of its tokenizer in the loop, their cache, a flow head, guidance."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tessellar.cli import sample, train
from tessellar.errors import UserError
from tessellar.models.mingtok import MingTokAR, mingtok_ar_l
from tessellar.models.mingtok.head import FlowHead
from tessellar.models.mingtok.official import Head, head_from_official, head_to_official
from tessellar.pipeline import ImageGenerator
from tessellar.processes.flow import Euler
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import ImplicitFlow
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import State
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Renormed
from tessellar.protocol.in_loop import Streamed
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.mingtok import MingTok, mingtok_512
from tessellar.tokenizers.quantizers.latent_norm import LatentNorm
from tessellar.tokenizers.titok import ViTSize
from tessellar.tokenizers.vit_vq import ViTVQ
from tests.tiny.configs import tokenizer_run

LABELS = Condition(ids=torch.tensor([0, 3]))
GUIDED = Guidance(Constant(2.5))
PRESET = 634_607_136


def shaken(module: Any, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return module.eval()


def tokenizer() -> MingTok:
    torch.manual_seed(0)
    size = ViTSize(24, 2, 3)
    return shaken(MingTok(LatentNorm(4, 0.3, 1.5), 12, 4, size, size, ViTSize(16, 1, 2)), 1)


def make(bound: bool = True, fresh: bool = False, **options: Any) -> MingTokAR:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_classes": 5, "feature_dim": 24, "head_width": 20, "head_depth": 2}
    layout = tokenizer().layout
    made = MingTokAR(layout, 32, 2, 4, ffn_multiple_of=8, **{**sizes, **options}).eval()
    if bound:
        made.bind(tokenizer())
    return made if fresh else shaken(made, 2)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 9, 4, generator=torch.Generator().manual_seed(3))


def velocities(made: MingTokAR, state: State, given: Tensor, count: int = 1) -> Tensor:
    """What the solver is told in the middle of its way, of `count` tokens."""
    distribution = made.predict(state, given, count)
    assert isinstance(distribution, ImplicitFlow)
    x = torch.randn(len(given), 9, 4, generator=torch.Generator().manual_seed(5))
    return distribution.model(x[:, :count], torch.tensor(0.4))


@torch.no_grad()
def test_the_cache_of_features_follows_images_that_stand_apart() -> None:
    """Roll-backs to unequal entities, windows, forks: as if each image had been read from its start."""
    made = make()
    given = tokens()
    state = made.start(LABELS, GUIDED, window=3)
    velocities(made, state, given, 5)
    part = state.part
    assert isinstance(part, Streamed) and part.cache is not None
    assert part.cache.lengths.tolist() == [4, 4]  # of entity 5 the input is token 4, not yet read
    state.rollback(torch.tensor([4, 1]))
    assert part.cache.lengths.tolist() == [3, 0]
    forked = state.select(torch.tensor([1, 0, 1]))
    changed = given + torch.tensor([0.0, 1.0])[:, None, None]  # image 1 draws other tokens
    for branch, images in ((state, [0, 1]), (forked, [1, 0, 1])):
        own = changed[images]
        found = velocities(made, branch, own, 3)
        for row, image in enumerate(images):
            first = [4, 1][image]
            alone = made.start(LABELS.select(torch.tensor([image])), GUIDED, window=3)
            if first:
                velocities(made, alone, changed[image : image + 1], first)
            x = torch.randn(len(images), 9, 4, generator=torch.Generator().manual_seed(5))
            distribution = made.predict(alone, changed[image : image + 1], 3)
            assert isinstance(distribution, ImplicitFlow)
            expected = distribution.model(x[row : row + 1, :3], torch.tensor(0.4))
            torch.testing.assert_close(found[row : row + 1], expected, atol=2e-5, rtol=1e-5)
    assert part.cache.lengths.tolist() == [6, 3]


@torch.no_grad()
def test_one_at_a_time_is_the_pass_that_is_trained() -> None:
    made = make()
    given = tokens()
    whole = made.score(given, LABELS)
    assert isinstance(whole, ImplicitFlow)
    state = made.start(LABELS)
    x = torch.randn(2, 9, 4)
    for entity in range(9):
        step = made.predict(state, given)
        assert isinstance(step, ImplicitFlow)
        at = torch.tensor(0.7)
        found = step.model(x[:, entity : entity + 1], at)
        expected = whole.model(x, at)[:, entity : entity + 1]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert whole.hidden is not None


@torch.no_grad()
def test_a_fixed_state_predicts_the_same() -> None:
    made = make()
    given = tokens()
    plain = made.start(LABELS, GUIDED, window=2)
    fixed = made.start(LABELS, GUIDED, window=2).fixed("cpu")
    for count, back in ((1, [1, 1]), (2, [3, 1]), (1, [2, 2]), (2, [4, 4])):
        expected = velocities(made, plain, given, count)
        found = velocities(made, fixed, given, count)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        plain.rollback(torch.tensor(back))
        fixed.rollback(torch.tensor(back))


@torch.no_grad()
def test_features_are_read_not_latents() -> None:
    made = make()
    whole = tokenizer()
    read: list[Tensor] = []
    made.project.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    made.score(tokens(), LABELS)
    torch.testing.assert_close(read[0], whole.semantics(tokens())[:, :-1], atol=1e-5, rtol=0)
    assert not any("semantic" in name for name, _ in made.named_parameters())


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity_that_is_integrated() -> None:
    made = make()
    noise = torch.randn(1, 2, 9, 4)
    t = torch.full((1, 2, 9), 0.3)
    times: list[Tensor] = []
    made.flow_head.time.register_forward_pre_hook(lambda _, given: times.append(given[0]))
    distribution = made.score(tokens(), LABELS)
    assert isinstance(distribution, ImplicitFlow)
    noisy = 0.7 * tokens() + 0.3 * noise[0]
    velocity = distribution.model(noisy, torch.tensor(0.3))
    error = (velocity - (noise[0] - tokens())).square()
    torch.testing.assert_close(made.flow_loss(tokens(), LABELS, t, noise), error.mean())
    # 1 is noise, and the head is told 1000 t.
    for given in times:
        torch.testing.assert_close(given, torch.full_like(given, 300.0))
    first = made.flow_loss(tokens(), LABELS, t, noise, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(first, error[0].mean())
    new = make(fresh=True)
    zero = new.flow_loss(tokens(), LABELS, t, noise)
    torch.testing.assert_close(zero, (tokens() - noise).square().mean())


@torch.no_grad()
def test_guidance_of_1_is_the_condition_and_renorm_bounds_the_length() -> None:
    made = make()
    x = torch.randn(2, 1, 4)
    at = torch.tensor(0.5)
    found: dict[str, Tensor] = {}
    rules = {
        "plain": NO_GUIDANCE,
        "one": Guidance(Constant(1.0)),
        "four": Guidance(Constant(4.0)),
        "bounded": Guidance(Renormed(4.0)),
    }
    for name, rule in rules.items():
        step = made.predict(made.start(LABELS, rule), tokens())
        assert isinstance(step, ImplicitFlow)
        found[name] = step.model(x, at)
    torch.testing.assert_close(found["one"], found["plain"])
    longer = found["four"].norm(dim=-1) / found["plain"].norm(dim=-1)
    ratio = found["bounded"].norm(dim=-1) / found["plain"].norm(dim=-1)
    torch.testing.assert_close(ratio, longer.clamp(max=1.0), atol=1e-4, rtol=0)
    assert bool((longer > 1).any())


def test_eulers_shift_and_temperature() -> None:
    seen: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return torch.ones_like(x)

    start = Noise([0]).normal(2, 3)
    drawn = Euler(4, time_shift=3.0, temperature=0.5).integrate(model, (2, 3), Noise([0]))
    torch.testing.assert_close(drawn, 0.5 * start - 1)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(torch.tensor(seen), 3 * even / (1 + 2 * even))
    with pytest.raises(UserError, match="flow temperature is -1"):
        Euler(4, temperature=-1)


def test_images_do_not_depend_on_their_batch_and_captions_are_read() -> None:
    model = ImageGenerator(tokenizer(), make(bound=False), make().make_conditioner())
    settings = Sampling(Constant(2.0), flow=Euler(3))
    together = model.sample(LABELS, settings, [4, 5])
    alone = model.sample(LABELS.select(torch.tensor([1])), settings, [5])
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(together, model.sample(LABELS, settings, [4, 5]))
    made = make(num_classes=None, caption_dim=6, caption_length=3)
    valid = torch.tensor([[False, True, True], [True, True, True]])
    caption = Condition(ids=None, valid=valid, features=torch.randn(2, 3, 6))
    loss = made.loss(tokens(), caption)["flow"]
    loss.backward()
    grads = [p.grad for n, p in made.named_parameters() if "conditioning" in n]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="MingTokAR predicts continuous tokens"):
        mingtok_ar_l(grid_layout(2, 2, Categorical(5)))
    with pytest.raises(UserError, match="needs either num_classes or caption_dim"):
        make(num_classes=None)
    with pytest.raises(UserError, match="MingTokAR has no tokenizer yet"):
        make(bound=False).loss(tokens(), LABELS)
    with pytest.raises(UserError, match="was built for inputs of 8 channels, the tokenizer has 24"):
        make(feature_dim=8)
    plain = ViTVQ.__new__(ViTVQ)
    with pytest.raises(UserError, match="decoded in the loop; ViTVQ has none"):
        make(bound=False).bind(plain)
    order = token_order(tokenizer().layout)
    shuffled = Entities(order.order.flip(0), order.sizes)
    with pytest.raises(UserError, match="in raster order"):
        make().start(LABELS, entities=shuffled)


def test_the_published_head_and_the_preset() -> None:
    with torch.device("meta"):
        head = FlowHead(32, 3072, width=3072, depth=12)
        made = mingtok_ar_l(mingtok_512().layout)
    assert sum(p.numel() for p in head.parameters()) == 1_284_876_320
    assert sum(p.numel() for p in made.parameters()) == PRESET


def test_the_head_comes_back_from_official_keys() -> None:
    made = make()
    state = head_to_official(Head(made.to_condition, made.flow_head))
    other = {**state, "model.model.norm.weight": torch.zeros(3)}
    again = head_from_official(other)
    x, t, hidden = torch.randn(3, 4), torch.rand(3), torch.randn(3, 32)
    expected = made.flow_head(x, t, made.to_condition(hidden))
    assert torch.equal(again.flow_head(x, t, again.to_condition(hidden)), expected)


def test_a_tiny_run_trains_both_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tokenizer_run(2, validate_every=2, save_every=2)
    size = {"width": 16, "depth": 1, "num_heads": 2}
    run["model"]["init_args"]["tokenizer"] = {
        "class_path": "tessellar.tokenizers.mingtok.MingTok",
        "init_args": {
            "quantizer": {
                "class_path": "tessellar.tokenizers.quantizers.latent_norm.LatentNorm",
                "init_args": {"dim": 4},
            },
            "image_size": 16,
            "patch_size": 4,
            "encoder_size": size,
            "semantic_size": size,
            "pixel_size": size,
            "masked": [0.3, 0.6],
        },
    }
    Path("tok.yaml").write_text(yaml.safe_dump(run))
    train.main(["fit", "--config", "tok.yaml", "--name", "tok"])
    run["model"] = {
        "class_path": "tessellar.training.generator_module.GeneratorModule",
        "init_args": {
            "tokenizer": "runs/tok/export",
            "generator": {
                "class_path": "tessellar.models.mingtok.MingTokAR",
                "init_args": {
                    "width": 16,
                    "depth": 1,
                    "num_heads": 2,
                    "num_classes": 10,
                    "feature_dim": 16,
                    "head_width": 16,
                    "head_depth": 1,
                    "ffn_multiple_of": 8,
                },
            },
        },
    }
    Path("gen.yaml").write_text(yaml.safe_dump(run))
    train.main(["fit", "--config", "gen.yaml", "--name", "gen"])
    words = [
        "--count",
        "3",
        "--guidance",
        "Constant",
        "--guidance.scale",
        "2",
        "--flow",
        "Euler",
        "--flow.steps",
        "2",
    ]
    sample.main(["runs/gen/export", "--out", "images", *words, "--device", "cpu"])
    assert len(list(Path("images").glob("*.png"))) >= 3

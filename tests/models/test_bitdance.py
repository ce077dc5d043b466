"""BitDance: published sizes, order and visibility of patches, the head's flow, null rows with their own first patch,
and its form over captions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.models.bitdance import (
    BinaryHead,
    BitDance,
    bitdance_b_1x,
    bitdance_b_4x,
    bitdance_b_16x,
    bitdance_h_1x,
    bitdance_l_1x,
)
from tessellar.models.bitdance import official as bitdance
from tessellar.models.bitdance.model import flipped
from tessellar.processes.flow import EulerMaruyamaToData
from tessellar.protocol.condition import Condition
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import Constant, Guidance, Linear
from tessellar.protocol.layout import Bits, Categorical, Layout, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral, decode_from
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tessellar.tensor_files import read_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
GRID = grid_layout(4, 4, Bits(6))
FEW = Sampling(flow=EulerMaruyamaToData(3))


@pytest.mark.parametrize(
    ("preset", "parameters", "entities", "flip"),
    [
        (bitdance_b_1x, 242_373_152, 256, 0.1),
        (bitdance_b_4x, 260_102_432, 64, 0.1),
        (bitdance_b_16x, 260_111_648, 16, 0.1),
        (bitdance_l_1x, 527_271_968, 256, 0.05),
        (bitdance_h_1x, 1_007_960_352, 256, 0.05),
    ],
)
def test_published_variants(
    preset: Callable[[Layout], BitDance], parameters: int, entities: int, flip: float
) -> None:
    with torch.device("meta"):
        made = preset(grid_layout(16, 16, Bits(32)))
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters
    assert made.entities.count == entities and made.flip == flip


@pytest.mark.parametrize(("patch", "parameters"), [(1, 22_106_144), (2, 39_833_120)])
def test_the_published_head(patch: int, parameters: int) -> None:
    with torch.device("meta"):
        head = bitdance_b_1x(grid_layout(16, 16, Bits(32)), patch=patch).denoiser
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


def small(patch: int = 2, **options: Any) -> BitDance:
    torch.manual_seed(0)
    sizes = {"head_width": 16, "head_depth": 2, "head_groups": 1, "head_dim": 8, **options}
    classes = {} if "caption_dim" in options else {"num_classes": 5, "class_tokens": 3}
    made = BitDance(GRID, 16, 2, 2, patch=patch, **classes, **sizes).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def labels(batch: int = 2) -> Condition:
    return Condition(ids=torch.arange(batch))


def bits(batch: int = 2, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (batch, 16, 6), generator=draw)


def test_patches_see_whole_patches_before_them() -> None:
    """Places: class 0 .. 2, queries 3 .. 5 with the last class, then patches of four."""
    made = small()
    assert made.prefix_length == 6
    assert made.block(torch.arange(14)).tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert made.input_ends(6, made.entities).tolist() == [2, 6, 10, 14, 18]
    assert made.entities.order.tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_single_tokens_are_causal() -> None:
    made = small(patch=1)
    assert torch.equal(made.block(torch.arange(9)), torch.arange(9))
    assert made.query is None and made.prefix_length == 3


@torch.no_grad()
def test_a_change_inside_of_a_patch_moves_all_behind_it_and_nothing_before() -> None:
    made = small()
    tokens = bits()
    changed = tokens.clone()
    place = int(made.entities.order[6])  # of the second patch
    changed[:, place] = 1 - changed[:, place]
    before = made.states(tokens, labels()).view(2, 4, 4, -1)
    after = made.states(changed, labels()).view(2, 4, 4, -1)
    same = (before - after).abs().amax((0, 3)) < 1e-5
    assert same[:2].all() and not same[2:].any()


@torch.no_grad()
def test_a_head_without_training_predicts_nothing_and_a_perfect_one_has_no_loss() -> None:
    head = BinaryHead(6, 8, 16, 2, groups=2)
    noisy = torch.randn(5, 1, 6)
    t = torch.linspace(0, 0.9, 5)
    assert torch.equal(head(noisy, t, torch.randn(5, 1, 8)), torch.zeros(5, 1, 6))
    clean = torch.zeros(5, 1, 6)
    losses = head.row_losses(clean, t, noisy, torch.randn(5, 1, 8))
    assert torch.equal(losses, torch.zeros(5, 1))
    ones = head.row_losses(torch.ones(5, 1, 6), t, noisy, torch.randn(5, 1, 8))
    torch.testing.assert_close(ones[:, 0], (1 - t) ** -2)


def test_a_bounded_head_stays_between_the_bits() -> None:
    head = BinaryHead(6, 8, 16, 2, tokens=4, head_dim=8, bounded=True)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    found = head(torch.randn(3, 4, 6), torch.rand(3), torch.randn(3, 4, 8))
    assert float(found.detach().abs().max()) <= 1


@torch.no_grad()
def test_the_sampler_ends_with_the_prediction_of_its_last_time() -> None:
    """x + 0.05 v at t = 0.95 is the prediction there."""
    made = small(patch=1)
    state = made.start(labels())
    flow = made.predict(state, bits())
    seen = []
    inner = made.denoiser.forward

    def watched(noisy: Tensor, t: Tensor, z: Tensor) -> Tensor:
        seen.append((float(t[0]), inner(noisy, t, z)))
        return seen[-1][1]

    made.denoiser.forward = watched  # type: ignore[method-assign]
    ended = EulerMaruyamaToData(5).integrate(flow.model, flow.shape, Noise([1, 2]))  # type: ignore[attr-defined]
    times = [t for t, _ in seen]
    torch.testing.assert_close(torch.tensor(times), torch.linspace(0, 0.95, 5))
    torch.testing.assert_close(ended, seen[-1][1], atol=1e-4, rtol=1e-4)
    assert set(flow.sample(FEW, Noise([1, 2])).unique().tolist()) <= {0, 1}


@torch.no_grad()
def test_signs_of_samples_have_the_frequencies_of_the_target() -> None:
    """The best prediction of independent bits that are 1 with probability p, from a noisy one."""
    p = torch.tensor([0.1, 0.5, 0.8])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        noise = t.float().clamp(min=1e-3)
        log_odds = (p / (1 - p)).log() + 2 * x * (1 - noise) / noise**2
        clean = (log_odds / 2).tanh()
        return (x - clean) / noise.clamp(min=0.05)

    drawn = EulerMaruyamaToData(60).integrate(velocity, (4000, 3), Noise([3]))
    shares = (drawn > 0).float().mean((0, 1))
    torch.testing.assert_close(shares, p, atol=0.03, rtol=0)


def test_bits_are_flipped_at_half_the_largest_rate() -> None:
    draw = torch.Generator().manual_seed(0)
    r1, r2 = torch.rand(2, 4, 500, 50, generator=draw)
    tokens = torch.randint(0, 2, (4, 500, 50), generator=draw)
    rate = (flipped(tokens, 0.4, r1, r2) != tokens).float().mean()
    assert abs(float(rate) - 0.2) < 0.005


def test_flips_are_read_and_never_predicted() -> None:
    """With every bit flipped in what is read, the first patch, which reads none, has the same loss."""
    made = small(flip=0.0, repeats=1, condition_dropout=0.0)
    tokens = bits()
    reads = []
    targets = []
    made.token_input.register_forward_hook(lambda m, given, out: reads.append(given[0]))
    row_losses = made.denoiser.row_losses
    made.denoiser.row_losses = lambda clean, *rest: (  # type: ignore[method-assign]
        targets.append(clean),
        row_losses(clean, *rest),
    )[1]
    for flip in (0.0, 1.0):
        made.flip = flip
        torch.manual_seed(0)
        made.train().loss(tokens, labels())
    assert torch.equal(targets[0], targets[1])
    share = (reads[0] != reads[1]).float().mean()
    assert 0.3 < float(share) < 0.7


def null_first(made: BitDance, guidance: Guidance) -> tuple[Tensor, Any]:
    state = made.start(labels(), guidance)
    tokens = GRID.blank(2)
    for step in decode_from(made, state, FEW, Noise([1, 2]), tokens):
        tokens = step.tokens
    return tokens, state.part


@torch.no_grad()
def test_null_rows_have_a_first_patch_of_their_own_where_the_first_is_not_guided() -> None:
    guidance = Guidance(Linear(3.0, reach_end=False))
    tokens, part = null_first(small(), guidance)
    first = tokens[:, small().entities.order[:4]]
    assert part.tokens.shape == (2, 4, 6) and not torch.equal(part.tokens, first)
    shared, none = null_first(small(share_first=True), guidance)
    assert none is None and torch.equal(shared[:, small().entities.order[:4]], first)
    assert not torch.equal(shared, tokens)
    assert null_first(small(), Guidance(Constant(3.0)))[1] is None


@torch.no_grad()
def test_an_image_is_the_same_alone_and_in_a_batch() -> None:
    made = small()
    guidance = Guidance(Linear(3.0, reach_end=False))
    both = Ancestral()(made, labels(), FEW, Noise([7, 8]), guidance)
    condition = labels().select(torch.tensor([1]))
    alone = Ancestral()(made, condition, FEW, Noise([8]), guidance)
    assert torch.equal(both[1:], alone)


@torch.no_grad()
def test_a_fork_keeps_the_null_rows_first_patch() -> None:
    made = small()
    state = made.start(labels(), Guidance(Linear(3.0, reach_end=False)))
    tokens = made.predict(state, GRID.blank(2)).sample(FEW, Noise([1, 2]))
    assert state.part is not None and tokens.shape == (2, 4, 6)
    forked = state.select(torch.tensor([1, 1, 0]))
    expected = state.part.tokens[[1, 1, 0]]  # type: ignore[attr-defined]
    assert torch.equal(forked.part.tokens, expected)  # type: ignore[union-attr]


def captions() -> Condition:
    features = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[False, True, True, True], [True, True, True, True]])
    return Condition(features=features, valid=valid)


@torch.no_grad()
def test_captions_in_place_of_classes() -> None:
    """Left-padded features, then queries; positions are fixed, so no table is learned; cached equals fresh."""
    made = small(caption_dim=7, caption_length=4)
    assert made.head_positions is None and made.denoiser.bounded and made.prefix_length == 7
    tokens = bits()
    guidance = Guidance(Constant(7.5))
    state = made.start(captions(), guidance)
    noisy = torch.randn(2, 4, 6)
    for entity in range(4):
        cached = made.predict(state, tokens).model(noisy, torch.tensor(0.5))  # type: ignore[attr-defined]
        fresh = made.start(captions(), guidance)
        again = made.predict(fresh, tokens, entity + 1, 1).model(noisy, torch.tensor(0.5))  # type: ignore[attr-defined]
        torch.testing.assert_close(cached, again, atol=1e-3, rtol=1e-4)
    losses = made.train().loss(tokens, captions())
    assert bool(losses["flow"].isfinite())


def test_text_positions_are_columns_then_rows() -> None:
    made = small(caption_dim=7, caption_length=4)
    table = made.fixed_positions
    assert table is not None and table.shape == (16, 16)
    order = made.entities.order
    same_column = order % 4 == order[0] % 4
    same_row = order // 4 == order[0] // 4
    assert torch.equal((table[:, :8] == table[0, :8]).all(1), same_column)
    assert torch.equal((table[:, 8:] == table[0, 8:]).all(1), same_row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": grid_layout(4, 4, Categorical(8))}, "BitDance generates one grid of bits"),
        ({"head_depth": 3, "head_groups": 2}, "2 modulations do not divide the head's 3 blocks"),
        ({"patch": 3}, "do not divide the grid"),
        ({"patch": 2, "head_dim": 5}, "attention heads of 5 channels do not divide 16"),
        ({"width": 12, "num_heads": 2}, "cannot turn by row and column"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"class_tokens": 0}, "class_tokens 0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    sizes = {"layout": GRID, "width": 16, "depth": 1, "num_heads": 2, "head_width": 16}
    with pytest.raises(UserError, match=message):
        BitDance(**{**sizes, **options})


@pytest.mark.parametrize("system", ["bitdance", "bitdance_parallel"])
def test_the_way_back_gives_the_official_names(system: str) -> None:
    """All that the recorded file holds, but its frozen tokenizer."""
    state, _ = read_safetensors(GOLDEN / system / "weights.safetensors")
    made = bitdance.from_official(state, grid_layout(4, 4, Bits(8)), 2)
    back = bitdance.to_official(made)
    assert back.keys() == {name for name in state if not name.startswith("vae.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_the_way_back_of_the_text_head_gives_the_official_names() -> None:
    state, _ = read_safetensors(GOLDEN / "bitdance_t2i_head" / "weights.safetensors")
    back = bitdance.head_to_official(bitdance.head_from_official(state, 4))
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_a_generator_of_other_bits_is_refused() -> None:
    state = bitdance.to_official(small())
    with pytest.raises(UserError, match="predicts 16 tokens of 6 bits, but the tokenizer gives"):
        bitdance.from_official(state, grid_layout(4, 4, Bits(7)), 2)


@torch.no_grad()
def test_speculative_decoding_says_in_one_line_that_there_are_no_probabilities() -> None:
    made: Generator = small()
    with pytest.raises(UserError) as refused:
        SpeculativeJacobi()(made, labels(), FEW, Noise([1, 2]), Guidance())
    assert len(str(refused.value).splitlines()) == 1 and "BitDance" in str(refused.value)

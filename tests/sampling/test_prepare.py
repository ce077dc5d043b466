"""Prepared generators give the values of the plain ones, in windows and with padding, and leave nothing behind."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache
from tessellar.layers.llama import LlamaBlock, Pass, Positions
from tessellar.models.llamagen import LlamaGen
from tessellar.models.rar import RAR
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.couplings import maximal
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.prepare import (
    MANY_ROWS,
    FusedBlock,
    FusedLinear,
    Product,
    WeightLayout,
    in_8_bits,
    prepared,
)
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import Rules, speculative_jacobi

GRID, GUIDED = grid_layout(3, 4, Categorical(23)), Guidance(Constant(2.0))


def captioned() -> LlamaGen:
    torch.manual_seed(0)
    generator = LlamaGen(GRID, 32, 2, 4, None, caption_dim=6, caption_length=5, ffn_multiple_of=8)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return generator.eval()


def captions(batch: int) -> Condition:
    valid = torch.arange(5) >= torch.tensor([0, 2, 4])[torch.arange(batch) % 3][:, None]
    features = torch.randn(batch, 5, 6, generator=torch.Generator().manual_seed(1))
    return Condition(valid=valid, features=features * valid[..., None])


@torch.no_grad()
def logits(generator: LlamaGen) -> Tensor:
    """Guided logits of a prefill, a window, and a step after images were rolled back apart."""
    tokens = torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(2))
    state, found = generator.start(captions(3), GUIDED, window=4), []
    for fed, count in ((None, 4), (torch.tensor([4, 1, 2]), 3), (torch.tensor([5, 4, 5]), 1)):
        if fed is not None:
            state.rollback(fed)
        found.append(generator.predict(state, tokens, count).logits)  # type: ignore[attr-defined]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("layout", ["auto", "plain", "transposed", "packed"])
def test_float32_values_agree(layout: WeightLayout) -> None:
    generator = captioned()
    plain = logits(generator)
    with prepared(generator, layout=layout):
        torch.testing.assert_close(logits(generator), plain, atol=1e-5, rtol=1e-5)


def rar() -> RAR:
    torch.manual_seed(0)
    generator = RAR(grid_layout(5, 8, Categorical(23)), 32, 2, 4, 48, 10)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return generator.eval()


@torch.no_grad()
def steps(generator: Generator, keep: Tensor | None = None) -> Tensor:
    """Guided logits of 40 steps of one token; half-way on, of the images `keep` alone."""
    count = generator.layout.length
    tokens = torch.randint(0, 23, (3, count), generator=torch.Generator().manual_seed(2))
    state = generator.start(Condition(ids=torch.tensor([1, 5, 9])), GUIDED)
    found = []
    for step in range(count):
        if keep is not None and step == count // 2:
            state = state.select(keep)
            tokens = tokens[keep]
        found.append(generator.predict(state, tokens).logits)  # type: ignore[attr-defined]
    return torch.cat([one.flatten(0, 1) for one in found])


@pytest.mark.parametrize("keep", [None, torch.tensor([2, 0])])
def test_modulations_of_sixteen_steps_at_once_are_those_of_each(
    monkeypatch: pytest.MonkeyPatch, keep: Tensor | None
) -> None:
    generator = rar()
    plain = steps(generator, keep)
    products: list[int] = []
    original = FusedLinear.__call__

    def counted(self, x: Tensor) -> Tensor:
        products.append(x.shape[1])
        return original(self, x)

    monkeypatch.setattr(FusedLinear, "__call__", counted)
    with prepared(generator):
        torch.testing.assert_close(steps(generator, keep), plain, atol=1e-4, rtol=1e-4)
    # 40 steps after a prefill: places 1 to 41, in chunks of 16, of two blocks.
    assert products.count(16) == 2 * (3 if keep is None else 4)
    assert generator.steps_ahead == 1


@pytest.mark.parametrize("layout", ["plain", "transposed", "packed"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_with_and_without_a_bias(layout: WeightLayout, bias: bool) -> None:
    linear = torch.nn.Linear(24, 40, bias=bias)
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        found = FusedLinear(linear, torch.float32, layout)(x)
        torch.testing.assert_close(found, linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [1, 17, 24, 64])  # the kernel reads 32 at once
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_off_by_half_a_step(columns: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, 40, bias=bias)
    linear.weight.data[3] = 0.0
    x = torch.randn(2, 3, columns).bfloat16().to(dtype)
    with torch.no_grad():
        found = FusedLinear(linear, dtype, "int8")(x)
        exact = linear(x.float())
    assert found.dtype == dtype and found.shape == exact.shape
    half_step = linear.weight.detach().abs().amax(1) / 127 / 2 * 1.01
    most = x.float().abs().sum(-1, keepdim=True) * half_step + 0.01 * exact.abs() + 0.004
    assert ((found.float() - exact).abs() <= most).all()
    weight, steps = in_8_bits(linear.weight)
    back = weight[:, :columns].float() * steps.float()[:, None]
    assert ((back - linear.weight).abs() <= steps.float()[:, None] / 2 * 1.01).all()
    assert weight.shape[1] % 32 == 0 and not weight[:, columns:].any()


def test_a_generator_with_int8_weights_draws_nearly_the_same() -> None:
    generator = captioned()
    plain = logits(generator)
    with prepared(generator, layout="int8"):
        rounded = logits(generator)
    assert not torch.equal(rounded, plain)
    assert (rounded - plain).norm() / plain.norm() < 0.05
    assert torch.equal(logits(generator), plain)
    with pytest.raises(UserError, match="leave one of them out"):
        Ancestral(compile=True, int8=True)


@pytest.mark.parametrize("rows", [MANY_ROWS, MANY_ROWS + 1])
def test_many_rows_take_the_weight_as_it_is(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    linear = torch.nn.Linear(24, 40)
    packed = FusedLinear(linear, torch.float32, "packed")
    x = torch.randn(rows, 1, 24)
    calls: list[int] = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(1) or original(*a))
    with torch.no_grad():
        found = packed(x)
        assert len(calls) == (rows > MANY_ROWS)
        torch.testing.assert_close(found, linear(x), atol=1e-5, rtol=1e-5)
    assert packed.product.for_many_rows is not None
    assert packed.product.for_many_rows.data_ptr() == linear.weight.data_ptr()  # no second copy


def test_prepared_twice_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed once for all batches inside an outer one."""
    made: list[int] = []
    original = Product.__init__
    monkeypatch.setattr(Product, "__init__", lambda *a, **k: made.append(1) or original(*a, **k))
    generator = captioned()
    with prepared(generator):
        first = len(made)
        with prepared(generator):
            logits(generator)
        assert len(made) == first > 0
        assert any("forward" in module.__dict__ for module in generator.modules())
    assert not any("forward" in module.__dict__ for module in generator.modules())


def test_bfloat16_is_as_close_as_autocast() -> None:
    """Within 3 % of the logits' range of float32, by dtype or by autocast, whose precision is the default."""
    generator = captioned()
    plain = logits(generator)
    with prepared(generator, torch.bfloat16):
        by_dtype = logits(generator)
    with torch.autocast("cpu", torch.bfloat16), prepared(generator):
        by_autocast = logits(generator)
    for rounded in (by_dtype, by_autocast):
        error = float((rounded - plain).abs().max())
        assert 0 < error < 0.03 * float(plain.max() - plain.min())


@pytest.mark.parametrize("rules", [None, Rules(5, coupling=maximal)])
def test_tokens_are_the_same(rules: Rules | None) -> None:
    generator, found = captioned(), []
    for ready in (False, True):
        with prepared(generator) if ready else torch.no_grad():
            given, choice, noise = captions(3), Choice(0.7), Noise([1, 2, 3])
            if rules is None:
                found.append(Ancestral()(generator, given, Sampling(choice=choice), noise, GUIDED))
            else:
                found.append(speculative_jacobi(generator, given, choice, noise, GUIDED, rules))
    assert torch.equal(*found)


def test_nothing_is_left_behind() -> None:
    generator = captioned()
    before = dict(generator.state_dict())
    with pytest.raises(RuntimeError, match="interrupted"), prepared(generator, torch.bfloat16):
        assert any("forward" in module.__dict__ for module in generator.modules())
        raise RuntimeError("interrupted")
    assert not any("forward" in module.__dict__ for module in generator.modules())
    after = generator.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    generator.loss(torch.zeros(3, 12, dtype=torch.int64), captions(3))["cross_entropy"].backward()
    assert all(p.grad is not None for p in generator.layers.parameters())


@torch.no_grad()
def test_a_block_with_a_position_bias() -> None:
    """Hita adds a bias to q and k before they turn."""
    torch.manual_seed(3)
    block, x, angles = LlamaBlock(32, 4, 48).eval(), torch.randn(2, 5, 32), torch.randn(1, 5, 4)
    positions, found = Positions(angles.cos(), angles.sin(), torch.randn(1, 5, 32)), []
    for forward in (block, FusedBlock(block, torch.float32)):
        cache = KVCache(1, 2, 4, 8, 8, torch.float32, torch.device("cpu"))
        found.append(forward(x, 0, Pass(positions, cache, cache.reserve(torch.arange(5)[None]))))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    unbiased = block(
        x, 0, Pass(positions._replace(bias=None), cache, cache.reserve(torch.arange(5)[None]))
    )
    assert not torch.allclose(unbiased, found[0], atol=1e-3)


def test_compilation_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, generator = [], captioned()

    def compile(function, dynamic: bool):
        compiled.append((function, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    with prepared(generator, compile=True):
        logits(generator)
    assert sum(isinstance(function, FusedBlock) for function, _ in compiled) == 2
    assert all(dynamic for _, dynamic in compiled)

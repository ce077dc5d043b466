"""Switches that trade memory or compile time for speed leave results and names as they are."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tessellar.models.parts.llama as llama
import tessellar.models.parts.prefix_transformer as transformer
import tessellar.protocol.distribution as distribution
from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.training.speed import (
    blocks,
    checkpoint_activations,
    chunk_the_loss,
    compile_each_block,
    compile_layers_together,
)


def test_recomputed_activations_give_the_same_losses(
    fit, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = [], transformer.checkpoint
    monkeypatch.setattr(
        transformer, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    _, plain = fit(make.generator_module(), 3)
    assert not calls
    _, recomputed = fit(make.generator_module(checkpointing=True), 3)
    assert recomputed == plain and len(calls) == 3  # one block, three batches


class Products(TorchDispatchMode):
    """Counts products of matrices and roots of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"mm": 0, "silu": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def counted(make, checkpointing) -> tuple[float, dict[str, int]]:
    generator = make.generator_module(checkpointing=checkpointing).model.generator.train()
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    torch.manual_seed(0)
    with Products() as products:
        loss = generator.loss(tokens, Condition(ids=torch.tensor([1, 2])))["cross_entropy"]
        loss.backward()
    return float(loss.detach()), products.counts


def test_selective_recomputing_repeats_no_product_of_matrices(make) -> None:
    plain, without = counted(make, False)
    all_again, everything = counted(make, True)
    selective, some = counted(make, "selective")
    assert plain == all_again == selective
    assert everything["mm"] > without["mm"] == some["mm"]
    assert some["silu"] == everything["silu"] == without["silu"] + 1


@pytest.mark.long
def test_all_layers_are_one_graph(fit, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really traced, without a break, forward and backward; the same losses."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: original(f, backend="aot_eager", **o))
    _, plain = fit(make.generator_module(), 3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = make.generator_module(compile_model=True)
    _, compiled = fit(module, 3)
    assert compiled == pytest.approx(plain, rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(UserError, match="Linear has no pass through"):
        compile_layers_together(nn.Linear(2, 2))
    with pytest.raises(UserError, match="choose one"):
        make.generator_module(compile_model=True, compile_blocks=True)


@pytest.mark.parametrize("codes", [1, 17])
def test_a_loss_in_parts_is_the_loss_where_there_are_that_many_codes(
    fit, make, monkeypatch: pytest.MonkeyPatch, codes: int
) -> None:
    calls = []
    original = distribution.linear_cross_entropy
    monkeypatch.setattr(llama, "MANY_CODES", codes)
    monkeypatch.setattr(
        distribution, "linear_cross_entropy", lambda *a: calls.append(1) or original(*a)
    )
    _, plain = fit(make.generator_module(), 3)
    assert not calls
    _, parts = fit(make.generator_module(chunked_loss=True), 3)
    assert len(calls) == (3 if codes == 1 else 0)  # the tokenizer has 16 codes
    assert parts == pytest.approx(plain, rel=1e-6)
    with pytest.raises(UserError, match="Linear has no loss"):
        chunk_the_loss(nn.Linear(2, 2))


def test_recomputing_is_refused_where_it_cannot_be_done() -> None:
    with pytest.raises(UserError, match="Linear cannot recompute"):
        checkpoint_activations(nn.Linear(2, 2))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are compiled, without the compiler."""
    found: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: found.append(self))
    return found


def test_blocks_are_compiled_one_by_one(make, compiled: list[nn.Module]) -> None:
    assert compile_each_block(make.tokenizer_module().tokenizer) == 2
    assert [type(m).__name__ for m in compiled] == ["ViTBlock", "ViTBlock"]
    with pytest.raises(UserError, match="Linear has no repeated blocks"):
        compile_each_block(nn.Linear(2, 2))


def test_only_outermost_lists_count() -> None:
    inner = nn.ModuleDict({"list": nn.ModuleList([nn.Identity()])})
    nested = nn.ModuleDict({"c": nn.ModuleList([nn.ReLU()])})
    outer = nn.ModuleDict({"a": nn.ModuleList([inner, nn.Identity()]), "b": nested})
    assert [type(m) for m in blocks(outer)] == [nn.ModuleDict, nn.Identity, nn.ReLU]


def test_the_modules_compile_what_they_train(make, compiled: list[nn.Module]) -> None:
    generator = make.generator_module(compile_blocks=True).model.generator
    assert compiled == list(generator.layers)
    tokenizer = make.tokenizer_module(compile_blocks=True).tokenizer
    assert compiled[1:] == [*tokenizer.encoder.blocks, *tokenizer.decoder.blocks]

"""Switches that trade memory or compile time for speed leave results and names as they are."""

import pytest
from torch import nn

import tessellar.models.llama as llama
from tessellar.errors import UserError
from tessellar.training.speed import blocks, checkpoint_activations, compile_each_block


def test_recomputed_activations_give_the_same_losses(fit, make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], llama.checkpoint
    monkeypatch.setattr(llama, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    _, plain = fit(make.generator_module(), 3)
    assert not calls
    _, recomputed = fit(make.generator_module(checkpointing=True), 3)
    assert recomputed == plain and len(calls) == 3  # one block, three batches


def test_recomputing_is_refused_where_it_cannot_be_done() -> None:
    with pytest.raises(UserError, match="Linear cannot recompute"):
        checkpoint_activations(nn.Linear(2, 2))


def test_blocks_are_compiled_one_by_one_and_keep_their_names(make) -> None:
    module = make.tokenizer_module()
    names = list(module.state_dict())
    compiled = compile_each_block(module.tokenizer)
    found = [m for m in module.tokenizer.modules() if m._compiled_call_impl is not None]
    assert compiled == len(found) == 2 and {type(m).__name__ for m in found} == {"ViTBlock"}
    assert list(module.state_dict()) == names
    with pytest.raises(UserError, match="Linear has no repeated blocks"):
        compile_each_block(nn.Linear(2, 2))


def test_only_outermost_lists_count() -> None:
    inner = nn.ModuleDict({"list": nn.ModuleList([nn.Identity()])})
    nested = nn.ModuleDict({"c": nn.ModuleList([nn.ReLU()])})
    outer = nn.ModuleDict({"a": nn.ModuleList([inner, nn.Identity()]), "b": nested})
    assert [type(m) for m in blocks(outer)] == [nn.ModuleDict, nn.Identity, nn.ReLU]


def test_the_module_compiles_what_it_trains(make) -> None:
    generator = make.generator_module(compile_blocks=True).model
    assert all(layer._compiled_call_impl is not None for layer in generator.generator.layers)
    assert all(m._compiled_call_impl is None for m in generator.tokenizer.modules())
    assert make.tokenizer_module(compile_blocks=True).tokenizer.encoder.blocks[0]._compiled_call_impl is not None

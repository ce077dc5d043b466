"""A recipe carried to another width and depth: the table of its file, and steps of one size."""

from functools import partial

import pytest
import torch
from torch import nn

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings
from tessellar.training.transfer import Transfer, shape_of


def model(width: int, depth: int = 2) -> LlamaGen:
    torch.manual_seed(0)
    layout = grid_layout(4, 4, Categorical(16))
    return LlamaGen(layout, width, depth, 2, num_classes=3, ffn_multiple_of=8, dropout=0.0)


def test_rates_and_decays_follow_the_table() -> None:
    made = model(64, depth=8)
    assert shape_of(made) == (64, 8)
    settings = OptimizerSettings(lr=1e-2, weight_decay=0.1, transfer=Transfer(32, base_depth=2))
    (optimizer,) = settings.make(made)
    found = {}
    for group in optimizer.param_groups:
        assert group["peak_lr"] == group["lr"]
        for parameter in group["params"]:
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    hidden = made.layers[0].feed_forward.w1.weight
    assert found[id(hidden)] == pytest.approx((1e-2 / 4, 0.4))
    assert found[id(made.output.weight)] == pytest.approx((1e-2 / 2, 0.2))
    assert found[id(made.token_embedding.weight)][0] == 1e-2
    assert found[id(made.norm.weight)] == (1e-2, 0.0)
    assert len(found) == len(list(made.parameters()))


def test_at_the_base_it_changes_nothing() -> None:
    plain = OptimizerSettings(lr=1e-2, weight_decay=0.1)
    transferred = OptimizerSettings(lr=1e-2, weight_decay=0.1, transfer=Transfer(32, 2))
    made = model(32)
    before = [parameter.clone() for parameter in made.parameters()]
    Transfer(32, 2).start(made)
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
    (a,), (b,) = plain.make(made), transferred.make(made)
    assert [{**g, "params": len(g["params"])} for g in a.param_groups] == [
        {**g, "params": len(g["params"])} for g in b.param_groups
    ]


def moved(width: int, transfer: Transfer | None) -> float:
    """Root mean square change of the last hidden states by four updates."""
    made = model(width).train()
    if transfer is not None:
        transfer.start(made)
    nn.init.normal_(made.output.weight, std=1.0 / width)
    (optimizer,) = OptimizerSettings(lr=4e-3, transfer=transfer).make(made)
    tokens = torch.randint(16, (8, 16), generator=torch.Generator().manual_seed(1))
    condition = Condition(ids=torch.arange(8) % 3)
    states = []
    made.norm.register_forward_hook(lambda module, args, output: states.append(args[0].detach()))
    for _ in range(5):
        loss = made.score(tokens, condition).cross_entropy(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((states[-1] - states[0]).square().mean().sqrt())


def test_updates_move_hidden_states_as_far_at_every_width() -> None:
    """muP's coordinate check: without the rule they move further the wider the model is."""
    with_rule = moved(256, Transfer(32)) / moved(32, Transfer(32))
    without = moved(256, None) / moved(32, None)
    assert 0.6 < with_rule < 1.7
    assert without > 1.5 * with_rule


def test_the_start_is_of_a_run_and_not_of_what_it_starts_from(fit) -> None:
    make = partial(LlamaGen, width=64, depth=1, num_heads=2, num_classes=10, ffn_multiple_of=8)

    def std(transfer: Transfer | None) -> float:
        torch.manual_seed(0)
        tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2)
        optimizer = OptimizerSettings(transfer=transfer)
        module = GeneratorModule(tokenizer, make, optimizer=optimizer)
        return float(module.model.generator.layers[0].feed_forward.w1.weight.detach().std())

    assert std(Transfer(16)) == pytest.approx(std(None) / 2)
    with pytest.raises(UserError, match="none"):
        shape_of(nn.Linear(2, 2))

"""Key tables and safe reading: patterns both ways, nothing guessed, nothing unpickled that is not a tensor."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tessellar.checkpoints.weights import fingerprint, load_strict
from tessellar.errors import UserError
from tessellar.interop.files import read_official, unwrap
from tessellar.interop.keys import Rule, table
from tessellar.tensor_files import read_pickle, read_safetensors

TABLE = table(
    {"blocks.{i}.attn.{tensor}": "layers.{i}.attention.{tensor}", "head.weight": "output.weight"},
    Rule("blocks.{i}.mlp.weight", "layers.{i}.mlp.weight", Tensor.t, Tensor.t),
    drop=("*.cache.*", "rope"),
)


def state(*names: str) -> dict[str, Tensor]:
    return {name: torch.arange(6.0).view(2, 3) + i for i, name in enumerate(names)}


def test_table_reads_both_ways() -> None:
    theirs = state(
        "blocks.0.attn.weight", "blocks.11.attn.bias", "head.weight", "blocks.3.mlp.weight"
    )
    ours = TABLE.from_official(theirs)
    assert set(ours) == {
        "layers.0.attention.weight",
        "layers.11.attention.bias",
        "output.weight",
        "layers.3.mlp.weight",
    }
    assert ours["layers.3.mlp.weight"].shape == (3, 2)
    back = TABLE.to_official(ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_dropped_keys_vanish_and_unknown_keys_are_fatal() -> None:
    assert TABLE.from_official(state("rope", "blocks.0.cache.k", "head.weight")).keys() == {
        "output.weight"
    }
    with pytest.raises(UserError, match=r"2 unknown: blocks\.x\.attn\.weight, head\.bias"):
        TABLE.from_official(state("head.bias", "head.weight", "blocks.x.attn.weight"))


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "ema"])
def test_unwrap_finds_the_weights(wrapper: str) -> None:
    content = {wrapper: {f"module.{k}": t for k, t in state("a", "b").items()}, "steps": 7}
    assert unwrap(content, "file").keys() == {"a", "b"}


def test_unwrap_takes_the_entry_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tessellar")
    content = {
        "model": state("a"),
        "ema": {"a": torch.full((2, 3), 9.0)},
        "optimizer": {"state": {0: state("m")}},
    }
    assert unwrap(content, "file", order=("model", "ema"))["a"][0, 0] == 0
    assert caplog.messages == ["file: 'model' is taken, not ema (--key takes another)"]
    assert unwrap(content, "file", "ema")["a"][0, 0] == 9
    assert unwrap({"trainer": content}, "file", "trainer.ema")["a"][0, 0] == 9
    with pytest.raises(UserError, match="has no entry 'emma'"):
        unwrap(content, "file", "emma")
    with pytest.raises(
        UserError, match="several sets of weights .model, ema.; choose one with --key"
    ):
        unwrap(content, "file")
    with pytest.raises(UserError, match="holds no weights"):
        unwrap({"steps": 3}, "file")


def test_unwrap_says_where_the_evaluated_entry_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tessellar")
    unwrap({"model": state("a")}, "file", order=("model_ema", "model"))
    assert caplog.messages == [
        "file has no 'model_ema', which the paper evaluates; 'model' is taken"
    ]
    caplog.clear()
    unwrap({"model_ema": state("a")}, "file", order=("model_ema", "model"))
    unwrap(state("a"), "file", order=("model_ema", "model"))
    assert caplog.messages == []


def test_training_checkpoint_with_namespace_is_read(tmp_path: Path) -> None:
    torch.save(
        {"model": state("a"), "args": argparse.Namespace(lr=1e-4), "steps": 3},
        tmp_path / "official.pt",
    )
    assert torch.equal(read_official(tmp_path / "official.pt")["a"], state("a")["a"])


class Hostile:
    """Unpickling this would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickle_with_code_is_refused_unrun(tmp_path: Path) -> None:
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match=r"hostile\.pt holds code \(\w+\.mkdir\)"):
        read_pickle(tmp_path / "hostile.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UserError):
        read_pickle(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    torch.save(state("a"), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    for name, content in {
        "empty.pt": b"",
        "page.pt": b"<!doctype html>",
        "text.safetensors": b"no header",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name in ("cut.pt", "empty.pt", "page.pt"):
        with pytest.raises(UserError, match=rf"{name} is truncated or not a torch file"):
            read_pickle(tmp_path / name)
    with pytest.raises(UserError, match="text.safetensors is truncated or not a safetensors file"):
        read_safetensors(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="absent.pt does not exist"):
        read_pickle(tmp_path / "absent.pt")


def test_strict_loading_lists_every_kind_of_mismatch() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = fingerprint(module)
    given = {
        "0.weight": torch.zeros(4, 4),
        "0.bias": torch.zeros(4),
        "1.weight": torch.zeros(2, 4),
        "2.bias": torch.zeros(1),
    }
    with pytest.raises(UserError) as caught:
        load_strict(module, given, "some file")
    message = str(caught.value)
    assert "some file does not fit Sequential" in message
    assert "1 missing: 1.bias" in message
    assert "1 unknown: 2.bias" in message
    assert "1 of another shape: 0.weight (4, 4) for (4, 3)" in message
    assert fingerprint(module) == before


def test_long_listings_are_shortened() -> None:
    with pytest.raises(UserError, match=r"40 unknown: k0, k1, k10, k11, k12 and 35 more$"):
        TABLE.from_official({f"k{i}": torch.zeros(1) for i in range(40)})


def test_fingerprint_sees_values_names_and_shapes() -> None:
    def of(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return fingerprint(module)

    base = of(a=torch.arange(6.0))
    assert base == of(a=torch.arange(6.0))
    others = [
        of(a=torch.arange(1, 7.0)),
        of(b=torch.arange(6.0)),
        of(a=torch.arange(6.0).view(2, 3)),
        of(a=torch.arange(6)),
    ]
    assert len({base, *others}) == 5

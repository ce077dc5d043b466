"""Checkpoints of several files: everything that one file does, in one process."""

import hashlib
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch

from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.callbacks.ema import EMA
from tessellar.checkpoints.kinds import look_into
from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.sharded import MARK, is_intact, read_sharded, write_sharded
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.runs import Run


def checkpoints(folder: Path, files: str, **options) -> Checkpoints:
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpoints(folder, 2, "val/loss", "min", files=files, **options)  # type: ignore[arg-type]


def run(make, fit, folder: Path, files: str, steps: int = 4, resume: Path | None = None):
    callbacks = [EMA(0.9), checkpoints(folder, files)]
    return fit(
        make.generator_module(width=48),
        steps,
        callbacks,
        enable_checkpointing=True,
        ckpt_path=resume,
    )


@pytest.fixture
def wide(make):
    """A generator with matrices that are large enough to be written apart."""
    usual = make.generator_module

    def made(width: int = 16, **options):
        torch.manual_seed(0)
        sizes = {"width": width, "depth": 1, "num_heads": 2, "ffn_multiple_of": 8}
        generator = partial(LlamaGen, num_classes=10, **sizes)
        return GeneratorModule(usual().model.tokenizer, generator, **options)

    make.generator_module = made
    return make


@pytest.mark.parametrize("files", ["sharded", "asynchronous"])
def test_a_run_goes_on_from_several_files_as_from_one(
    wide, fit, tmp_path: Path, files: str
) -> None:
    _, whole = run(wide, fit, tmp_path / "whole", "whole", 6)
    run(wide, fit, tmp_path / files, files)
    last = tmp_path / files / "last.ckpt"
    assert last.is_dir() and (tmp_path / files / "previous.ckpt").is_dir() and is_intact(last)
    assert {path.name.partition("_")[0] for path in (tmp_path / files).iterdir()} == {
        "last.ckpt",
        "previous.ckpt",
        "tokenizer",
    }
    assert MARK in str(look_into(last)["state_dict"])  # the large tensors lie apart
    _, resumed = run(wide, fit, tmp_path / "on", files, 6, resume=last)
    assert resumed == whole[4:]


def test_what_is_read_from_several_files_is_what_one_holds(wide, fit, tmp_path: Path) -> None:
    for files in ("whole", "sharded"):
        run(wide, fit, tmp_path / files, files)
    one, several = (read_source(tmp_path / f / "last.ckpt") for f in ("whole", "sharded"))
    assert one.weights == several.weights == "ema" and one.record == several.record
    assert one.tensors.keys() == several.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, several.tensors[name]), name
    several.build("generator")


def test_milestones_stay_and_the_one_before_a_damaged_one_is_taken(
    wide, fit, tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "checkpoints"
    callback = checkpoints(folder, "sharded", keep_every=2)
    fit(wide.generator_module(width=48), 4, [callback], enable_checkpointing=True)
    kept = folder / "update_00000002.ckpt"
    assert (
        look_into(kept)["global_step"] == 2 and look_into(folder / "last.ckpt")["global_step"] == 4
    )
    assert Run("a", tmp_path, resume="auto").checkpoint == folder / "last.ckpt"
    part = next((folder / "last.ckpt").glob("*.distcp"))
    part.unlink()  # the milestone has names of its own
    part.write_bytes(b"short")
    assert not is_intact(folder / "last.ckpt") and is_intact(folder / "update_00000004.ckpt")
    with pytest.raises(UserError, match="is damaged or not complete"):
        read_source(folder / "last.ckpt")
    assert Run("a", tmp_path, resume="auto").checkpoint == folder / "previous.ckpt"


class Code:
    def __reduce__(self):
        return (print, ("this was run",))


def test_metadata_that_hold_code_are_refused(tmp_path: Path, capsys) -> None:
    write_sharded({"a": torch.ones(40, 40), "b": 3}, tmp_path, together=False)
    assert torch.equal(read_sharded(tmp_path)["a"], torch.ones(40, 40))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Code()))
    assert not is_intact(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        read_sharded(tmp_path)
    (tmp_path / "metadata.sha256").write_text(hashlib.sha256(pickle.dumps(Code())).hexdigest())
    with pytest.raises(UserError, match="is damaged"):
        read_sharded(tmp_path)
    assert "this was run" not in capsys.readouterr().out


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "rest.pt", "metadata.sha256"])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, file: str) -> None:
    """Bytes between the parts of a torch file belong to none of them; all others have a checksum."""
    torch.manual_seed(0)
    content = {"a": torch.randn(64, 32), "b": [torch.randn(2000), 3], "c": torch.arange(5)}
    write_sharded(content, tmp_path, together=False)
    whole = (tmp_path / file).read_bytes()
    found = 0
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        (tmp_path / file).write_bytes(damaged)
        try:
            read = read_sharded(tmp_path)
        except UserError:
            found += 1
            continue
        assert torch.equal(read["a"], content["a"]) and torch.equal(read["c"], content["c"])
        assert torch.equal(read["b"][0], content["b"][0]) and read["b"][1] == 3
    assert found > (20 if file != "rest.pt" else 5)


def test_numbers_lists_and_small_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    content = {"a": [1, (2.5, "x"), {"b": torch.arange(3)}], "c": torch.randn(64, 32), 5: None}
    write_sharded(content, tmp_path, together=False)
    found = read_sharded(tmp_path)
    assert found["a"][:2] == content["a"][:2] and found[5] is None
    assert torch.equal(found["a"][2]["b"], torch.arange(3))
    assert torch.equal(found["c"], content["c"])

"""Checkpoints of a run share one copy of the frozen tokenizer, and say what they need without it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.checkpoints.frozen import FILE, FROZEN_KEY
from tessellar.checkpoints.reading import load_tokenizer, read_source
from tessellar.errors import UserError

PREFIX = "model.tokenizer."


@pytest.fixture
def folder(make, fit, tmp_path: Path) -> Path:
    """Checkpoints of a run of four updates, `last` and `previous`."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    fit(
        make.generator_module(),
        4,
        [Checkpoints(folder, 2, "val/loss", "min")],
        enable_checkpointing=True,
    )
    return folder


def content(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_one_copy_of_the_tokenizer_serves_all_checkpoints(make, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["last.ckpt", "previous.ckpt"] and len(names) == 3
    assert FILE.fullmatch(names[2])
    for name in names[:2]:
        held = content(folder / name)
        assert not any(key.startswith(PREFIX) for key in held["state_dict"])
        assert f"tokenizer_{held[FROZEN_KEY][PREFIX]}.safetensors" == names[2]
    source = read_source(folder / "last.ckpt")
    expected = make.generator_module().model.tokenizer.state_dict()
    found = source.state("tokenizer")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    source.build("generator")


def test_a_checkpoint_taken_out_of_its_run_says_what_it_needs(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "last.ckpt"
    alone.parent.mkdir()
    shutil.copyfile(folder / "last.ckpt", alone)
    with pytest.raises(UserError, match=r"needs the frozen tokenizer of it: put tokenizer_\w+\."):
        read_source(alone)
    (frozen,) = folder.glob("tokenizer_*")
    shutil.copyfile(frozen, alone.with_name(frozen.name))
    assert len(read_source(alone).state("tokenizer")) > 0
    with pytest.raises(UserError, match="is a generator"):
        load_tokenizer(alone)


@pytest.mark.parametrize("same", [True, False])
def test_a_run_goes_on_with_the_tokenizer_that_it_had(make, fit, folder: Path, same: bool) -> None:
    """Without its file where the run's own config brings the very same one, else from the file."""
    straight, losses = fit(make.generator_module(), 6)
    module = make.generator_module()
    (frozen,) = folder.glob("tokenizer_*")
    if same:
        frozen.unlink()
    else:
        torch.nn.init.normal_(module.model.tokenizer.patch_in.weight)
    _, resumed = fit(module, 6, ckpt_path=folder / "last.ckpt")
    assert resumed == losses[4:]
    theirs = straight.lightning_module.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items())


def test_a_tokenizer_that_changes_after_all_gets_a_file_of_its_own(
    make, fit, tmp_path: Path
) -> None:
    class Changing(Checkpoints):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            if pl_module.updates == 3:
                torch.nn.init.ones_(pl_module.model.tokenizer.patch_in.weight)
            super().on_train_batch_end(trainer, pl_module, *rest)

    changing = Changing(tmp_path, 2, "val/loss", "min")
    fit(make.generator_module(), 4, [changing], enable_checkpointing=True)
    assert len(list(tmp_path.glob("tokenizer_*"))) == 2
    before = read_source(tmp_path / "previous.ckpt").state("tokenizer")["patch_in.weight"]
    after = read_source(tmp_path / "last.ckpt").state("tokenizer")["patch_in.weight"]
    assert after.eq(1).all() and not before.eq(1).all()


def test_what_somebody_else_saves_is_whole(make, fit, folder: Path, tmp_path: Path) -> None:
    trainer, _ = fit(make.generator_module(), 1)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    held = content(tmp_path / "own.ckpt")
    assert FROZEN_KEY not in held and any(key.startswith(PREFIX) for key in held["state_dict"])


def test_a_file_of_another_tokenizer_under_the_name_is_refused(folder: Path) -> None:
    (frozen,) = folder.glob("tokenizer_*")
    save_file(load_file(frozen), frozen, metadata={"fingerprint": "0" * 16})
    with pytest.raises(UserError, match="is not the tokenizer that its name says"):
        read_source(folder / "last.ckpt")

"""Damage: a single flipped bit in any file of ours is noticed, by every command that reads it, in one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tessellar
from tessellar import npz
from tessellar.checkpoints.export import export_generator
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli import convert, evaluate, sample
from tessellar.errors import UserError
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import network_of
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator
from tessellar.tensor_files import intact, read_safetensors, write_safetensors
from tessellar.text.encoders import FeatureCache
from tessellar.tokenizers.losses.perceptual import VGGFeatures
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.sharding import Sharded
from tessellar.training.tokenizer_module import TokenizerModule


def flip(path: Path, values: Tensor | np.ndarray, name: str = "") -> Path:
    """One bit of the first of some values that the file holds; in a copy where there is a name."""
    content = bytearray(path.read_bytes())
    content[content.index(np.asarray(values).tobytes()) + 3] ^= 0x40
    target = path.with_name(name) if name else path
    target.write_bytes(content)
    return target


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Callable[..., ViTVQ]) -> Path:
    module = TokenizerModule(tokenizer(), TokenizerLoss(perceptual_weight=0))
    content: dict = {"state_dict": module.state_dict(), "global_step": 7, "callbacks": {}}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    return flip(
        tmp_path / "last.ckpt", content["state_dict"]["tokenizer.patch_in.weight"], "flipped.ckpt"
    )


def test_a_damaged_checkpoint_is_refused_by_all_that_read_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    message = r"flipped.ckpt is damaged: its part \S+ does not have its checksum"
    assert intact(checkpoint.with_name("last.ckpt")) and not intact(checkpoint)
    with pytest.raises(UserError, match=message):
        tessellar.load(checkpoint)
    with pytest.raises(UserError, match=message):
        convert.main(["export", str(checkpoint), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        convert.main(
            [
                "import",
                "titok",
                str(checkpoint.rename(tmp_path / "flipped.ckpt")),
                "--out",
                str(tmp_path / "o"),
            ]
        )
    with pytest.raises(UserError, match=message):
        Sharded().load_checkpoint(checkpoint)
    assert tessellar.load(checkpoint.with_name("last.ckpt"))


def test_a_file_written_anew_is_checked_anew(checkpoint: Path) -> None:
    checkpoint.with_name("last.ckpt").replace(checkpoint)
    assert intact(checkpoint)


def test_weights_of_losses_are_checked(tmp_path: Path) -> None:
    from tessellar.tensor_files import read_state

    torch.save(VGGFeatures().state_dict(), tmp_path / "vgg.pth")
    flip(tmp_path / "vgg.pth", next(iter(torch.load(tmp_path / "vgg.pth").values())))
    with pytest.raises(UserError, match="vgg.pth is damaged"):
        read_state(tmp_path / "vgg.pth")


def test_old_torch_files_load_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tessellar.tensor_files import read_pickle

    caplog.set_level("INFO", "tessellar")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(tmp_path / "old.pt")["a"], torch.ones(2))
    assert caplog.messages == [
        f"{tmp_path / 'old.pt'} carries no checksums, so damage to it would not be noticed"
    ]


@pytest.fixture
def export(tmp_path: Path, generator: Callable[..., ImageGenerator]) -> Path:
    return export_generator(generator(), tmp_path / "export")


def test_a_damaged_export_is_refused_by_every_command(export: Path, tmp_path: Path) -> None:
    flip(
        export / "model.safetensors",
        load_file(export / "model.safetensors")["generator.output.weight"],
    )
    message = "model.safetensors is damaged: its tensors do not have its checksum"
    for path in (export, export / "model.safetensors"):
        with pytest.raises(UserError, match=message):
            tessellar.load(path)
    with pytest.raises(UserError, match=message):
        sample.main([str(export), "--count", "1", "--out", str(tmp_path / "samples")])
    with pytest.raises(UserError, match=message):
        convert.main(["info", str(export)])
    with pytest.raises(UserError, match=message):
        evaluate.main(
            [
                "model",
                str(export),
                "--extractor",
                "none",
                "--reference",
                str(tmp_path),
                "--count",
                "2",
            ]
        )


def test_a_changed_description_is_noticed_too(export: Path) -> None:
    file = export / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'num_heads\\": 2', b'num_heads\\": 1', 1))
    with pytest.raises(UserError, match="is damaged"):
        tessellar.load(file)


def test_an_export_without_a_checksum_loads_with_one_line(
    export: Path, caplog: pytest.LogCaptureFixture, generator: Callable[..., ImageGenerator]
) -> None:
    caplog.set_level("INFO", "tessellar")
    tessellar.load(export)
    assert not any("checksum" in line for line in caplog.messages)
    tensors = load_file(export / "model.safetensors")
    save_file(tensors, export / "model.safetensors")
    assert fingerprint(tessellar.load(export)) == fingerprint(generator())
    assert caplog.messages == [
        f"{export / 'model.safetensors'} carries no checksum, so damage to it would not be noticed"
    ]


def test_tensors_of_every_type_have_a_checksum(tmp_path: Path) -> None:
    types = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): torch.ones(3, 2, dtype=dtype) for dtype in types}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    write_safetensors(tensors, tmp_path / "all.safetensors")
    found, _ = read_safetensors(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensors[name]) for name in tensors
    )


def test_networks_that_measure_are_checked(tmp_path: Path) -> None:
    facts = NetworkFacts("tiny", "test_resnet", 3, (32, 32))
    state = network_of(facts).state_dict()
    write_safetensors(state, tmp_path / "net.safetensors", facts.to_metadata())
    assert load_extractor(tmp_path / "net.safetensors").name == "tiny"
    flip(tmp_path / "net.safetensors", next(t for t in state.values() if t.ndim == 4))
    with pytest.raises(UserError, match="net.safetensors is damaged"):
        load_extractor(tmp_path / "net.safetensors")


def test_statistics_and_samples_in_npz_are_checked(tmp_path: Path) -> None:
    mean = np.arange(64.0) + 0.123
    npz.write_arrays(tmp_path / "ref.npz", {"mu": mean, "arr_0": mean[:, None]})
    flip(tmp_path / "ref.npz", mean)
    with pytest.raises(UserError, match="ref.npz is truncated or not readable"):
        npz.read_arrays(tmp_path / "ref.npz", {"mean": ("mu",)})
    npz.write_arrays(tmp_path / "rows.npz", {"arr_0": mean[:, None]})
    flip(tmp_path / "rows.npz", mean)
    with (
        pytest.raises(UserError, match="rows.npz is truncated or not readable"),
        npz.open_rows(tmp_path / "rows.npz", "arr_0") as rows,
    ):
        rows.read(64)


def test_features_of_texts_are_checked(tmp_path: Path) -> None:
    class Encoder:
        source, length = "t5", 4

    cache = FeatureCache(Encoder(), str(tmp_path))  # type: ignore[arg-type]
    features = torch.rand(3, 2).to(torch.bfloat16)
    cache._write("a", features)
    assert torch.equal(cache._read("a"), features)  # type: ignore[arg-type]
    flip(cache.path("a"), features.view(torch.int16))
    with pytest.raises(UserError, match="is damaged"):
        cache._read("a")

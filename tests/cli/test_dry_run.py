"""`train.py --dry_run`: what a run would take, without data, weights or anything written."""

import re
from pathlib import Path

import pytest
import torch

from tessellar.absent import random_where_absent, stays_random
from tessellar.cli import dry_run, train
from tessellar.errors import UserError
from tessellar.tokenizers.losses.perceptual import LPIPS
from tessellar.training.flops import peak_of

GENERATOR = ["--config", "demo/generator", "--runs_root", "runs"]


def number(text: str, told: str) -> float:
    found = re.search(text, told)
    assert found is not None, f"{text} is not in: {told}"
    return float(found[1].replace(",", ""))


def test_a_generator_without_its_tokenizer_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its tokenizer is that of the config beside it; operations are those of the run, by hand from
    its sizes.
    """
    monkeypatch.chdir(tmp_path)
    assert train.main([*GENERATOR, "--dry_run", "A100"]) == 0
    told = capsys.readouterr().out
    trained = number(r"parameters: ([\d,]+) trained", told)
    assert trained == 920_064 and number(r"([\d,]+) frozen", told) == 823_700
    operations = 1e9 * number(r"operations: ([\d.,]+) GFLOP", told)
    # Forward and backward of 36 tokens through all weights but the embeddings, and the tokenizer forward.
    assert 0.5 < operations / (6 * 36 * trained + 2 * 36 * 823_700) < 1.5
    hours = operations * 89_600 / (0.4 * peak_of("A100", "bf16-mixed")) / 3600
    assert number(r"about ([\d.e-]+) hours on one A100", told) == pytest.approx(hours, rel=0.01)
    assert "random, since not here: runs/demo-tokenizer/export" in told
    assert number(r": ([\d.]+) s an update", told) > 0
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_what_does_not_fit_is_counted_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr(dry_run, "at_smallest_batch", None)  # whoever calls it fails
    assert train.main([*GENERATOR, "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "not run: 0.0 GB and activations do not fit into 0.0 GB" in told
    assert number(r"about ([\d.e-]+) hours on one H100", told) > 0


def test_a_gpu_that_is_not_known_is_named() -> None:
    with pytest.raises(UserError, match="no peak rate is known of 'B1000'"):
        train.main([*GENERATOR, "--dry_run", "B1000"])


def test_a_tokenizer_that_nothing_names_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no config or preset is named nobody"):
        train.main([*GENERATOR, "--model.tokenizer", "runs/nobody/export", "--dry_run"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vq_16", "tessellar.tokenizers.llamagen.vq_16"),
        ("runs/kl16/export", "tessellar.tokenizers.kl_vae.kl16"),
        ("runs/bar_fsq/export", "tessellar.tokenizers.bar_fsq.bar_fsq_256"),
    ],
)
def test_presets_are_found_by_the_name_of_an_export(name: str, expected: str) -> None:
    assert dry_run.recipe_of(name, None)["class_path"] == expected
    sized = dry_run.recipe_of("imports/vq_16_512", None)
    assert sized["init_args"] == {"image_size": 512}


def test_weights_are_random_in_a_dry_run_alone(tmp_path: Path) -> None:
    absent = str(tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match="there is no file"):
        LPIPS(absent)
    with random_where_absent() as paths:
        loss = LPIPS(absent)
        assert not stays_random(tmp_path), "what is there is read"
    assert paths == [absent] and not stays_random(absent)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    images = torch.rand(1, 3, 32, 32)
    assert loss(images, images).item() == 0.0

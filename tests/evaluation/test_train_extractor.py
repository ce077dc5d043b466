"""Training a feature network: it learns, its file is complete, and its augmentation is what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessellar.data.sets.image_folder import ImageFolderData
from tessellar.errors import UserError
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import TimmNetwork
from tessellar.evaluation.networks.train_extractor import (
    Architecture,
    Recipe,
    augment,
    train_extractor,
)
from tessellar.networks.facts import refuse_evaluator


def test_it_learns_and_its_file_is_all_one_needs(stripes: ImageFolderData, tmp_path: Path) -> None:
    recipe = Recipe(epochs=8, lr=4e-3, flip=True, crop=1)
    state = torch.get_rng_state()
    facts = train_extractor(
        stripes, tmp_path / "net.safetensors", Architecture("test_resnet"), recipe
    )
    assert torch.equal(torch.get_rng_state(), state)
    extractor = load_extractor(tmp_path / "net.safetensors")
    assert isinstance(extractor, TimmNetwork) and extractor.facts == facts
    assert extractor.distance == "FD(stripes-test_resnet)"
    assert (
        facts.training["data"] == "stripes"
        and facts.training["data_fingerprint"] == stripes.fingerprint()
    )
    assert facts.training["val_accuracy"] > 0.9 and facts.training["epochs"] == 8
    with pytest.raises(UserError, match="network for evaluation"):
        refuse_evaluator(tmp_path / "net.safetensors")


def test_a_teacher_may_not_measure_and_says_so(stripes: ImageFolderData, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    facts = train_extractor(
        stripes, path, Architecture("test_resnet"), Recipe(epochs=1), purpose="teacher"
    )
    assert facts.purpose == "teacher"
    refuse_evaluator(path)
    with pytest.raises(UserError, match="network for teaching"):
        load_extractor(path)


@pytest.fixture
def stripes(write_pngs: Callable[..., Path], tmp_path: Path) -> ImageFolderData:
    """Noise with lying and with standing stripes."""
    noise = torch.randint(0, 100, (2, 40, 3, 16, 16))
    wave = 100 * (torch.arange(16) // 2 % 2)
    write_pngs((noise[0] + wave[:, None]).to(torch.uint8), tmp_path / "stripes" / "lying")
    write_pngs((noise[1] + wave).to(torch.uint8), tmp_path / "stripes" / "standing")
    return ImageFolderData(
        str(tmp_path / "stripes"), 16, val_share=0.25, crop="none", flip=False, batch_size=20
    )


def test_one_class_is_refused(image_folder_of_one_class: Path, tmp_path: Path) -> None:
    data = ImageFolderData(str(image_folder_of_one_class), 16, val_share=0.5)
    with pytest.raises(UserError, match="1 class"):
        train_extractor(data, tmp_path / "net.safetensors")


@pytest.fixture
def image_folder_of_one_class(random_images, write_pngs, tmp_path: Path) -> Path:
    return write_pngs(random_images(4, size=16), tmp_path / "flat")


def test_shifts_and_mirrors_stay_within_bounds() -> None:
    ramp = torch.arange(8.0).repeat(64, 3, 8, 1)
    shifted = augment(ramp, False, 2, torch.Generator().manual_seed(0))
    offsets = {int(image[0, 4, 4] - 4) for image in shifted}
    assert offsets == {-2, -1, 0, 1, 2}
    mirrored = augment(ramp, True, 0, torch.Generator().manual_seed(0))
    both = {bool(torch.equal(image, ramp[0].flip(-1))) for image in mirrored}
    assert both == {True, False}
    assert torch.equal(augment(ramp, False, 0, torch.Generator()), ramp)

"""PSNR, SSIM and LPIPS of reconstructions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import alexnet

from tessellar.errors import UserError
from tessellar.evaluation.networks.lpips import load_lpips
from tessellar.measures.paired import PairedSums, psnr, ssim

Images = Callable[..., Tensor]


def test_psnr_of_a_known_error(random_images: Images) -> None:
    """Every value off by 16 of 255 levels: 20 log10(255 / 16)."""
    images = random_images(2).clamp(max=200)
    expected = 20 * torch.log10(torch.tensor(255 / 16, dtype=torch.float64))
    torch.testing.assert_close(psnr(images + 16, images), expected.expand(2))


def test_equal_images_have_finite_psnr_and_full_similarity(random_images: Images) -> None:
    images = random_images(2)
    assert psnr(images, images).isfinite().all() and bool((psnr(images, images) > 80).all())
    torch.testing.assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64))


def test_ssim_of_flat_images_is_its_luminance_term() -> None:
    """Without contrast only (2ab + c) / (a^2 + b^2 + c) is left, c = (0.01 * 255)^2 (Wang et al. 2004)."""
    a, b, c = 100.0, 50.0, (0.01 * 255) ** 2
    images = [torch.full((1, 3, 16, 16), int(level), dtype=torch.uint8) for level in (a, b)]
    assert float(ssim(*images)) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-4)


@pytest.mark.parametrize("size", [(11, 24), (32, 19)])
def test_ssim_agrees_with_torchmetrics(random_images: Images, size: tuple[int, int]) -> None:
    a = random_images(3, seed=1, size=32)[..., : size[0], : size[1]]
    noise = random_images(3, seed=2, size=32)[..., : size[0], : size[1]] // 4
    b = (a // 2 + noise).clamp(max=255)
    b[0, 0] = 7  # a flat channel
    theirs = structural_similarity_index_measure(
        a.double(), b.double(), data_range=255.0, reduction="none", kernel_size=11
    )
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(ssim(a, b), theirs.reshape(3), rtol=1e-9, atol=1e-12)


def test_sums_do_not_depend_on_batches(random_images: Images) -> None:
    images, originals = random_images(6, seed=1), random_images(6, seed=2)
    whole, parts = PairedSums(), PairedSums()
    whole.update(images, originals)
    for rows in torch.arange(6).split(4):
        parts.update(images[rows], originals[rows])
    assert parts.compute() == pytest.approx(whole.compute()) and whole.compute().lpips is None


def test_lpips_takes_torchvisions_backbone_from_a_file(
    random_images: Images, tmp_path: Path
) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in alexnet().state_dict().items()}
    state = {
        name: 0.05 * torch.randn(shape)
        for name, shape in shapes.items()
        if name.startswith("features")
    }
    torch.save(state, tmp_path / "alexnet.pth")
    sums = PairedSums(load_lpips(tmp_path / "alexnet.pth", "alex"))
    sums.update(random_images(2, size=64), random_images(2, size=64))
    assert sums.compute().lpips == 0
    sums.update(random_images(2, size=64), random_images(2, size=64, seed=5))
    lpips = sums.compute().lpips
    assert lpips is not None and lpips > 0


@pytest.mark.usefixtures("offline")
def test_missing_lpips_weights_are_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="alex weights of LPIPS cannot be downloaded.*--lpips_weights FILE"
    ):
        load_lpips(backbone="alex")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth does not fit"):
        load_lpips(tmp_path / "x.pth", "alex")


def test_pairs_of_unequal_or_tiny_images_are_refused(random_images: Images) -> None:
    with pytest.raises(UserError, match="reconstructions are"):
        PairedSums().update(random_images(2), random_images(2, size=16))
    with pytest.raises(UserError, match="at least 11 pixels"):
        PairedSums().update(random_images(2, size=8), random_images(2, size=8))

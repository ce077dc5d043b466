"""Alignment with a vision model's features: one distance an image, margins, grids of other sizes."""

import pytest
import torch

from tessellar.tokenizers.losses.alignment import cosine_distance, regrid


def test_distance_of_each_image() -> None:
    target = torch.randn(3, 5, 4)
    features = torch.stack([2 * target[0], -target[1], torch.zeros(5, 4)])
    torch.testing.assert_close(
        cosine_distance(features, target), torch.tensor([0.0, 2.0, 1.0]), atol=1e-5, rtol=0
    )


def test_a_margin_leaves_alone_what_is_similar_enough() -> None:
    target = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    features = torch.tensor([[[1.0, 0.1], [0.0, 1.0]]], requires_grad=True)
    loss = cosine_distance(features, target, margin=0.25)
    torch.testing.assert_close(loss, torch.tensor([0.375]))
    loss.sum().backward()
    assert features.grad is not None and not features.grad[0, 0].any() and features.grad[0, 1].any()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="features have shape"):
        cosine_distance(torch.zeros(1, 4, 8), torch.zeros(1, 9, 8))


def test_regrid_keeps_means_and_order() -> None:
    ramp = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 3)
    coarse = regrid(ramp, (4, 4), (2, 2))
    assert coarse.shape == (1, 4, 3) and coarse[0, :, 0].diff().gt(0).all()
    torch.testing.assert_close(coarse.mean(), ramp.mean())
    assert regrid(ramp, (4, 4), (4, 4)) is ramp
    assert regrid(ramp[:, :8], (2, 4), (4, 8)).shape == (1, 32, 3)

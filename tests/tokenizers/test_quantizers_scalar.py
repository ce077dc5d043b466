"""FSQ: every id is a point of the grid and back, gradients are those of the squashing, residual levels get finer."""

from math import prod

import pytest
import torch

from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.residual_vq import residual_fsq

FORMS = [{}, {"symmetric": True}, {"symmetric": True, "clamp": True}]


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("levels", [(8, 5, 2), (3, 4, 7)])
def test_ids_are_the_points_of_the_grid(levels: tuple[int, ...], options: dict[str, bool]) -> None:
    quantizer = FSQ(levels, **options)
    ids = torch.arange(prod(levels))
    codes = quantizer.decode(ids)
    assert torch.equal(quantizer.ids(codes), ids) and len(codes.unique(dim=0)) == len(ids)
    assert [len(codes[:, c].unique()) for c in range(3)] == list(levels)
    assert torch.equal(quantizer.ids(codes[1]) - quantizer.ids(codes[0]), torch.tensor(1))
    assert not (codes[1] != codes[0])[1:].any()  # channel 0 is the least significant digit
    if options:
        torch.testing.assert_close(codes, -codes.flip(0))


@pytest.mark.parametrize("options", FORMS)
def test_every_code_is_reached(options: dict[str, bool]) -> None:
    z = torch.cartesian_prod(*[torch.linspace(-4, 4, 400)] * 2)
    assert len(FSQ((8, 5), **options).encode(z).unique()) == 40


def test_clamped_codes_quantize_to_themselves() -> None:
    quantizer = FSQ((8, 5, 2), symmetric=True, clamp=True)
    codes = quantizer.decode(torch.arange(80))
    torch.testing.assert_close(quantizer.quantize(codes), codes)
    squashed = FSQ((8, 5, 2))
    assert not torch.equal(squashed.encode(squashed.decode(torch.arange(80))), torch.arange(80))


@pytest.mark.parametrize("options", FORMS)
def test_gradients_are_those_of_the_squashing(options: dict[str, bool]) -> None:
    quantizer, cotangent = FSQ((8, 5, 3), **options), torch.randn(2, 9, 3)
    z = 0.5 * torch.randn(2, 9, 3)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad((quantizer(z).quantized * cotangent).sum(), z)
    levels = torch.tensor([8.0, 5, 3])
    step = 2 / (levels - 1) if options else 1 / (levels // 2)
    (expected,) = torch.autograd.grad((quantizer.bound(z) * step * cotangent).sum(), z)
    torch.testing.assert_close(gradient, expected)


def test_residual_levels_get_finer() -> None:
    z = 0.5 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    errors = []
    for depth in (1, 2, 3):
        quantizer = residual_fsq((5, 5, 5), depth)
        squashed = (z / 1.25).tanh() * 1.25
        errors.append(float((quantizer.decode(quantizer.encode(z)) - squashed).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]

"""VAR's discriminator on a small random transformer, and the augmentation of what it sees."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.networks.vision import Teacher, VisionModel
from tessellar.tokenizers.losses.diff_augment import DiffAugment, colour, cut_out, translate
from tessellar.tokenizers.losses.dino_discriminator import DinoDiscriminator, LocalBatchNorm


def small(**options) -> DinoDiscriminator:
    torch.manual_seed(0)
    vit = VisionModel(
        "vit_tiny_patch16_224",
        image_size=32,
        options={"patch_size": 8, "embed_dim": 24, "depth": 3},
    )
    vit.filled = True
    torch.nn.init.normal_(vit.network.cls_token)
    return DinoDiscriminator(Teacher(vit), layers=(0, 2), kernel=3, **options)


def test_five_heads_on_vit_s_have_the_published_size() -> None:
    with torch.device("meta"):
        heads = DinoDiscriminator(Teacher(VisionModel("vit_small_patch16_224.dino")))
    each = (384 * 384 + 384 + 768) + (9 * 384 * 384 + 384 + 768) + 385
    assert sum(p.numel() for p in heads.parameters()) == 5 * each == 7_386_245


def test_logits_of_every_patch_of_the_embedding_and_of_each_layer() -> None:
    discriminator = small().eval()
    assert discriminator(torch.rand(4, 3, 32, 32)).shape == (4, 3 * 16)
    assert not any("vision" in key for key in discriminator.state_dict())


def test_it_reads_the_embedding_and_the_blocks_with_the_class_token_added() -> None:
    discriminator = small().eval()
    network, images = discriminator.vision.model.network, torch.rand(2, 3, 32, 32)
    seen: list[torch.Tensor] = []
    hooks = [network.norm_pre, network.blocks[0], network.blocks[2]]
    handles = [
        module.register_forward_hook(lambda _, __, out: seen.append(out)) for module in hooks
    ]
    expected = discriminator(images)
    for handle in handles:
        handle.remove()
    found = [
        head((x[:, 1:] + x[:, :1]).mT) for head, x in zip(discriminator.heads, seen, strict=True)
    ]
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_gradients_reach_the_images_and_the_heads_but_not_the_network() -> None:
    discriminator, images = small(), torch.rand(2, 3, 32, 32, requires_grad=True)
    discriminator(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is not None for p in discriminator.parameters())
    assert all(p.grad is None for p in discriminator.vision.model.parameters())


def test_weights_of_the_heads_are_normalised_to_their_largest_singular_value() -> None:
    discriminator = small()
    with torch.no_grad():
        for p in discriminator.parameters():
            p.mul_(10)
    for _ in range(30):
        discriminator(torch.rand(2, 3, 32, 32))
    for head in discriminator.eval().heads:
        largest = torch.linalg.matrix_norm(head.second[0].weight.detach().flatten(1), 2)
        assert float(largest) == pytest.approx(1, abs=0.02)


def test_larger_images_are_cropped_or_averaged() -> None:
    images = torch.rand(2, 3, 64, 64)
    averaged = small(crop=0.0).eval()
    torch.testing.assert_close(
        averaged(images), averaged(torch.nn.functional.avg_pool2d(images, 2))
    )
    torch.manual_seed(3)
    cropped = small(crop=1.0).at_network_size(images)
    windows = images.unfold(2, 32, 1).unfold(3, 32, 1)
    same = (windows == cropped[:, :, None, None]).all(-1).all(-1).all(1)
    assert cropped.shape == (2, 3, 32, 32) and same[0].equal(same[1]) and same[0].sum() == 1


def test_batch_norm_looks_at_groups() -> None:
    torch.manual_seed(0)
    norm, x = LocalBatchNorm(3, virtual_batch=4), torch.randn(8, 3, 5)
    torch.testing.assert_close(norm(x), torch.cat([norm(x[:4]), norm(x[4:])]))
    one = norm(x[:4])
    torch.testing.assert_close(one.mean((0, 2)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        norm(x[:5]), torch.cat([norm(x[i : i + 1]) for i in range(5)])
    )  # 5 has no equal halves


def test_a_network_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="blocks 0 to 2; layers is"):
        small().__class__(small().vision, layers=(0, 3))
    with pytest.raises(UserError, match="no vision transformer with a class token"):
        DinoDiscriminator(Teacher(VisionModel("resnet10t", image_size=32)))
    empty = small()
    empty.vision.model.filled = False
    with pytest.raises(UserError, match="has no weights"):
        empty(torch.rand(1, 3, 32, 32))


def test_translation_moves_each_image_and_fills_with_zeros() -> None:
    torch.manual_seed(0)
    images = torch.rand(64, 3, 16, 24) + 1
    moved = translate(images)
    shifts = set()
    for before, after in zip(images, moved, strict=True):
        rows, columns = (after[0] != 0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        bottom, right = 16 - int(rows.max()) - 1, 24 - int(columns.max()) - 1
        dy, dx = top - bottom, left - right
        expected = torch.zeros_like(before)
        expected[:, top : 16 - bottom, left : 24 - right] = before[
            :, bottom : 16 - top, right : 24 - left
        ]
        torch.testing.assert_close(after, expected)
        shifts.add((dy, dx))
    assert {dy for dy, _ in shifts} == {-2, -1, 0, 1, 2} and {dx for _, dx in shifts} <= {
        -3,
        -2,
        -1,
        0,
        1,
        2,
        3,
    }


def test_cutout_and_colour_are_of_each_image() -> None:
    torch.manual_seed(0)
    images = torch.rand(256, 3, 20, 20) + 0.5
    holes = (cut_out(images, 0.2) == 0).all(1).sum((1, 2))
    assert holes.max() == 16 and holes.min() >= 4 and len(holes.unique()) > 2
    pixels = colour(images)
    brightness = (pixels - images).mean((1, 2, 3))
    assert brightness.abs().max() <= 0.5 + 1e-5 and brightness.std() > 0.2
    assert colour(images[:1].expand(2, -1, -1, -1)).unbind()[0].ne(pixels[0]).any()


def test_augmentation_happens_to_a_share_of_batches_and_is_differentiable() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    assert DiffAugment(0.0)(images) is images
    unchanged = sum(DiffAugment(0.5)(images) is images for _ in range(400))
    assert 20 <= unchanged <= 85  # Binomial(400, 1/8): outside with probability 3e-6
    DiffAugment(1.0)(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        DiffAugment(1.5)


def test_images_in_zero_to_one_are_augmented_twice_as_far_and_filled_with_black() -> None:
    torch.manual_seed(0)
    images = 2 * torch.rand(512, 3, 32, 32) - 1
    for unit_range, spread in ((False, 0.276), (True, 0.561)):
        torch.manual_seed(0)
        colours = DiffAugment(1.0, 0.0, unit_range)
        shift = (colours(images) - images).mean((1, 2, 3)).std()
        assert abs(float(shift) - spread) < 0.05
    bright = torch.full((64, 3, 32, 32), 0.8)
    order = ("colour", "translation", "cutout")
    torch.manual_seed(0)
    last = DiffAugment(1.0, 0.2, unit_range=True, order=order)(bright)
    assert float((last == -1).float().mean()) > 0.03  # black: nothing comes after the cut
    torch.manual_seed(0)
    assert float((DiffAugment(1.0, 0.2, order=order)(bright) == 0).float().mean()) > 0.03  # grey


def test_colours_before_the_move_leave_its_border_as_it_is() -> None:
    images = torch.full((64, 3, 32, 32), 0.5)
    torch.manual_seed(0)
    after = DiffAugment(1.0, 0.0)(images)  # colour acts on what the translation filled
    before = DiffAugment(1.0, 0.0, order=("colour", "translation", "cutout"))(images)
    assert float((before == 0).float().mean()) > 0.02 > float((after == 0).float().mean())
    with pytest.raises(ValueError, match="each once"):
        DiffAugment(order=("colour", "colour", "cutout"))


def test_the_discriminator_sees_augmented_images() -> None:
    discriminator, images = small(augment=DiffAugment(1.0)).eval(), torch.rand(4, 3, 32, 32)
    torch.manual_seed(1)
    first = discriminator(images)
    torch.manual_seed(1)
    augmented = DiffAugment(1.0)(images)
    discriminator.augment = None
    torch.testing.assert_close(first, discriminator(augmented))

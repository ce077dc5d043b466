import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from tessellar.data.crops import (
    Filter,
    Resize,
    center_crop,
    center_square,
    random_crop,
    resize_shorter,
    ten_crop,
)
from tessellar.data.framing import DRAWS, Framing
from tessellar.errors import UserError
from tessellar.randomness import derive, uniforms

sides, sizes = st.integers(1, 150), st.integers(1, 40)
draws = st.floats(0, 1, exclude_max=True)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a crop tells where it was taken."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@given(sides, sides, sizes)
def test_the_centre_crop_has_its_size(width: int, height: int, size: int):
    assert center_crop(Image.new("RGB", (width, height)), size).size == (size, size)


@given(sides, sides, sizes, draws, draws, draws)
def test_the_random_crop_has_its_size(
    width: int, height: int, size: int, a: float, b: float, c: float
):
    assert random_crop(Image.new("RGB", (width, height)), size, (a, b, c)).size == (size, size)


@given(sides, sides, sizes, sizes, draws, draws, draws)
def test_crops_of_rectangles_have_their_size(
    width: int, height: int, rows: int, columns: int, a: float, b: float, c: float
):
    image = Image.new("RGB", (width, height))
    wanted = (columns, rows)
    assert center_crop(image, (rows, columns)).size == wanted
    assert random_crop(image, (rows, columns), (a, b, c)).size == wanted
    assert ten_crop(image, (rows, columns), 7).size == wanted


def test_a_rectangle_shows_as_much_as_fits_undistorted():
    """Of a gradient 100 x 40 a crop 40 x 60 takes the central 60 columns as they are."""
    image = gradient(100, 40)
    crop = np.asarray(center_crop(image, (40, 60)))
    assert np.array_equal(crop, np.asarray(image)[:, 20:80])
    square = Framing((16, 16), "random")
    assert square == Framing(16, "random") and square.describe() == Framing(16, "random").describe()
    with pytest.raises(UserError, match="square"):
        Framing((16, 24), "random", resize=Resize())
    with pytest.raises(UserError, match="needs 24x16"):
        Framing((16, 24), "none").view(Image.new("RGB", (16, 24)), 0, "it")


@given(sides, sides, sizes, st.integers(0, 9), st.floats(1, 2))
def test_ten_crops_have_their_size(width: int, height: int, size: int, view: int, ratio: float):
    assert ten_crop(Image.new("RGB", (width, height)), size, view, ratio).size == (size, size)


def test_the_centre_crop_halves_by_boxes_and_then_resizes_bicubically():
    image = noise(130, 90)
    halved = np.asarray(image).astype(float).reshape(45, 2, 65, 2, 3).mean((1, 3))
    box = image.resize((65, 45), Image.Resampling.BOX)
    assert abs(np.asarray(box) - halved).max() <= 1
    expected = box.resize((43, 30), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(center_crop(image, 30)), np.asarray(expected)[:, 6:36])


def test_an_image_of_the_right_size_is_left_alone():
    image = noise(24, 24)
    assert np.array_equal(np.asarray(center_crop(image, 24)), np.asarray(image))


def test_a_shorter_side_of_twice_the_size_is_halved_only():
    assert np.array_equal(
        np.asarray(resize_shorter(noise(40, 60), 20)),
        np.asarray(noise(40, 60).resize((20, 30), Image.Resampling.BOX)),
    )


def test_the_centre_crop_is_central():
    crop = np.asarray(center_crop(gradient(100, 40), 40)).astype(int)
    assert crop[0, 0, 0] == 30 and crop[0, -1, 0] == 69
    tall = np.asarray(center_crop(gradient(40, 100), 40)).astype(int)
    assert tall[0, 0, 1] == 30 and tall[-1, 0, 1] == 69


def test_random_crops_span_scales_and_positions():
    image, size = gradient(160, 160), 64
    widths = {
        scale: int(np.asarray(random_crop(image, size, (scale, 0.0, 0.0)))[0, -1, 0])
        for scale in (0.0, 0.5, 0.999)
    }
    # One pixel of the crop covers 160 / shorter pixels: 64 of them reach as far as the shorter side says.
    for scale, shorter in ((0.0, 64), (0.5, 72), (0.999, 80)):
        assert widths[scale] == pytest.approx(160 * 64 / shorter, abs=3)
    left = np.asarray(random_crop(image, size, (0.999, 0.0, 0.5)))[0, 0]
    right = np.asarray(random_crop(image, size, (0.999, 0.999, 0.5)))[0, -1]
    assert left[0] <= 2 and right[0] >= 157


def test_ten_crops_are_torchvisions():
    image = noise(70, 90)
    enlarged = center_crop(image, 35)
    for view, expected in enumerate(F.ten_crop(enlarged, [32, 32])):
        assert np.array_equal(np.asarray(ten_crop(image, 32, view, 1.1)), np.asarray(expected)), (
            view
        )
    views = torch.stack([torch.from_numpy(np.array(ten_crop(image, 32, v))) for v in range(10)])
    assert len(views.flatten(1).unique(dim=0)) == 10


def test_an_eleventh_crop_is_refused():
    with pytest.raises(ValueError, match="view is 10"):
        ten_crop(noise(40, 40), 32, 10)


@pytest.mark.parametrize(
    ("ratio", "name"), [(1.0, "bicubic"), (1.125, "lanczos"), (1.0, "bilinear")]
)
@given(st.integers(8, 150), st.integers(8, 150), st.integers(1, 40))
def test_a_fixed_resize_is_torchvisions(
    ratio: float, name: Filter, width: int, height: int, size: int
):
    image = noise(width, height)
    expected = F.resize(image, round(ratio * size), InterpolationMode[name.upper()])  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(Resize(ratio, name)(image, size)), np.asarray(expected))


@given(sides, sides, sizes)
def test_the_centre_of_a_resized_image_is_torchvisions(width: int, height: int, size: int):
    image = Resize()(gradient(width, height), size)
    assert np.array_equal(
        np.asarray(center_square(image, size)), np.asarray(F.center_crop(image, [size, size]))
    )


def test_a_crop_of_a_resized_image_has_one_scale_and_every_place():
    """VAR's: the shorter side is 1.125 times the size at every visit, the position uniform."""
    image = gradient(90, 72)
    framing = Framing(
        64, "random", resize=Resize(1.125, "lanczos")
    )  # a shorter side of 72: the image itself
    corners = [(0.0, 0.0), (0.999, 0.0), (0.0, 0.999), (0.5, 0.5)]
    for scale in (0.0, 0.5, 0.999):
        seen = [
            np.asarray(framing.draw(image, (0.9, scale, x, y), "here"))[0, 0, :2].tolist()
            for x, y in corners
        ]
        assert seen == [[0, 0], [26, 0], [0, 8], [13, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "ten", "resize": Resize()}, "resize goes with crop 'random' or 'center'"),
        ({"crop": "adm", "resize": Resize()}, "resize goes with crop 'random' or 'center'"),
        ({"crop": "center"}, "crop 'center' needs a resize"),
    ],
)
def test_a_resize_goes_with_the_crops_that_have_no_rule_of_their_own(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        Framing(16, **options)


def test_a_resize_that_no_crop_fits_in_is_refused():
    with pytest.raises(UserError, match="ratio is at least 1"):
        Resize(0.9)


def test_fingerprints_tell_resizes_apart_and_keep_those_from_before():
    assert Framing(16, "random", True).describe() == ["random", True, None]
    assert Framing(16, "random", True, resize=Resize()).describe() == [
        "random",
        True,
        None,
        [1.0, "bicubic"],
    ]


def test_random_crops_give_way_to_centre_crops_between_two_epochs() -> None:
    """More and more visits from epoch 700 to 750 show the centre; the share of mirror images stays."""
    framing = Framing(20, "random", flip=True, centring=(700, 750))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    centre = np.asarray(center_crop(image, 20))
    for epoch, expected in ((0, 0.0), (700, 0.0), (725, 0.5), (750, 1.0), (800, 1.0)):
        assert framing.random_share(epoch) == 1 - expected
        draws = uniforms(derive(3, epoch), range(400), DRAWS).tolist()
        shown = [np.asarray(framing.draw(image, row, "it", epoch)) for row in draws]
        same = [np.array_equal(one, centre) for one in shown]
        mirrored = [np.array_equal(one[:, ::-1], centre) for one in shown]
        assert abs(np.mean(np.array(same) | np.array(mirrored)) - expected) < 0.08
        assert abs(np.mean(mirrored) - expected / 2) < 0.08
    with pytest.raises(UserError, match="two epochs, one before the other"):
        Framing(8, "random", centring=(750, 700))
    with pytest.raises(UserError, match="of crop 'random'"):
        Framing(8, "adm", centring=(7, 9))

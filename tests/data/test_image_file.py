from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessellar.data.image_file import read_image
from tessellar.errors import UserError


def saved(path: Path, image: Image.Image, **options) -> np.ndarray:
    image.save(path, **options)
    read = read_image(path)
    assert read.mode == "RGB"
    return np.asarray(read).astype(int)


def test_transparent_pixels_become_white(tmp_path: Path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 0, 100, 255)
    rgba[2] = (200, 0, 100, 128)
    pixels = saved(tmp_path / "a.png", Image.fromarray(rgba))
    assert (pixels[0] == (200, 0, 100)).all() and (pixels[3] == 255).all()
    assert abs(pixels[2] - (227, 127, 177)).max() <= 1
    grey = saved(tmp_path / "b.png", Image.fromarray(rgba[..., [0, 3]], mode="LA"))
    assert (grey[0] == 200).all() and (grey[3] == 255).all()


def test_palettes_with_and_without_transparency(tmp_path: Path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert saved(tmp_path / "a.png", image).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert saved(tmp_path / "b.png", image, transparency=1).tolist() == [
        [[10, 20, 30], [255, 255, 255]]
    ]


def test_16_bit_grey_levels_are_scaled_and_not_clipped(tmp_path: Path):
    levels = np.array([[0, 257, 25700, 65535]], np.uint16)
    assert saved(tmp_path / "a.png", Image.fromarray(levels))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_cmyk_grey_and_bilevel(tmp_path: Path):
    pixels = saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    assert abs(pixels - (255, 0, 0)).max() < 12
    assert (saved(tmp_path / "b.png", Image.new("L", (2, 2), 77)) == 77).all()
    assert (saved(tmp_path / "c.png", Image.new("1", (2, 2), 1)) == 255).all()


def test_exif_rotation_is_applied(tmp_path: Path):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after turning 90 degrees clockwise
    pixels = saved(tmp_path / "a.jpg", image, exif=exif)
    assert pixels.shape == (16, 8, 3) and pixels[:6].min() > 200 and pixels[10:].max() < 50


def test_webp_and_the_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    pixels = saved(
        tmp_path / "a.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True
    )
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for keep in (0, 3, 30, len(content) // 2):
        (tmp_path / name).write_bytes(content[:keep])
        with pytest.raises(UserError, match=f"cannot read the image .*{name}: ."):
            read_image(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    for limit in (1500, 500):  # Pillow warns above its limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="bomb.png.*decompression bomb"):
            read_image(tmp_path / "bomb.png")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="nothing.png"):
        read_image(tmp_path / "nothing.png")


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x20\0\0\0WEBP"]),
)
def test_random_bytes_end_in_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, magic: bytes
):
    path = tmp_path_factory.mktemp("bytes") / "x.png"
    path.write_bytes(magic + content)
    with pytest.raises(UserError):
        read_image(path)

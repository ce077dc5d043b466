import itertools

import numpy as np
import pytest
import torch

from tessellar.data.sets.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scenes,
    Shapes,
    captions,
    draw_scenes,
    render,
)
from tessellar.images import to_uint8


def scene(shape: str, radius: float = 0.7) -> Scenes:
    index = np.array([list(SHAPES).index(shape)])
    zero = np.array([0])
    return Scenes(index, zero, zero, zero, np.zeros((1, 2)), np.array([radius]), np.zeros((1, 3)))


def test_images_labels_and_captions_have_the_promised_form():
    batch = Shapes(size=24, length=100).batch(range(40))
    assert batch["image"].shape == (40, 3, 24, 24) and batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() and batch["image"].max() <= 1
    assert batch["label"].bincount().tolist() == [4] * 10
    for label, caption in zip(batch["label"], batch["caption"], strict=True):
        size, colour, shape, background = (caption.split()[i] for i in (1, 2, 3, 6))
        assert shape == list(SHAPES)[label]
        assert size in SIZES and colour in COLOURS and background in BACKGROUNDS


def test_a_sample_depends_on_its_seed_and_index_only():
    data = Shapes(size=16, length=50, seed=3)
    forward, backward = (
        data.batch([4, 17, 30]),
        Shapes(size=16, length=500, seed=3).batch([30, 17, 4]),
    )
    assert torch.equal(forward["image"], backward["image"].flip(0))
    assert (
        torch.equal(data[17]["image"], forward["image"][1])
        and data[17]["caption"] == forward["caption"][1]
    )
    assert not torch.equal(Shapes(size=16, length=50, seed=4)[17]["image"], data[17]["image"])


def test_splits_share_no_image():
    train, val = (
        Shapes(size=32, length=300, split=s).batch(range(300))["image"] for s in ("train", "val")
    )
    every = torch.cat([train, val]).flatten(1).unique(dim=0)
    assert len(every) == 600


def test_the_caption_tells_the_colours_of_the_pixels():
    batch = Shapes(size=32, length=200).batch(range(200))
    pixels = to_uint8(batch["image"]).float()
    for image, caption in zip(pixels, batch["caption"], strict=True):
        words = caption.split()
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        background = torch.tensor(BACKGROUNDS[words[6]])[:, None]
        assert ((corners - background).abs().amax(0) < 2).sum() >= 3
        colour = torch.tensor(COLOURS[words[2]])[:, None, None]
        assert ((image - colour).abs().amax(0) <= 13).sum() >= 12


def test_shapes_fill_what_their_geometry_says():
    def area(shape: str) -> float:
        image = render(scene(shape), 128)[0].astype(float)
        red, black = COLOURS["red"][0], BACKGROUNDS["black"][0]
        return float(((image[..., 0] - black) / (red - black)).mean() * 4 / 0.7**2)

    assert area("circle") == pytest.approx(np.pi * 0.95**2, rel=0.01)
    assert area("square") == pytest.approx(4 * 0.85**2, rel=0.01)
    assert area("diamond") == pytest.approx(2, rel=0.01)
    assert area("triangle") == pytest.approx(3 * 3**0.5 * 0.52**2, rel=0.01)
    assert area("hexagon") == pytest.approx(2 * 3**0.5 * 0.85**2, rel=0.01)
    assert area("ring") == pytest.approx(np.pi * (0.98**2 - 0.54**2), rel=0.01)
    assert area("cross") == pytest.approx(4 * (2 * 0.95 * 0.3 - 0.3**2), rel=0.01)
    assert area("star") == pytest.approx(5 * 0.42 * np.sin(np.pi / 5), rel=0.02)


def test_shapes_differ_from_each_other():
    images = {name: render(scene(name), 32)[0].astype(float) for name in SHAPES}
    for one, other in itertools.combinations(SHAPES, 2):
        assert abs(images[one] - images[other]).mean() > 3, (one, other)


def test_edges_are_smooth_and_the_scene_is_the_same_at_every_size():
    scenes = draw_scenes(5, range(20))
    small, large = render(scenes, 16).astype(float), render(scenes, 64).astype(float)
    pooled = large.reshape(20, 16, 4, 16, 4, 3).mean((2, 4))
    assert abs(small - pooled).mean() < 3
    assert len(np.unique(render(scene("circle"), 32)[..., 0])) >= 6
    assert captions(scenes)[0].startswith("a ")


def test_shapes_stay_inside_the_image():
    scenes = draw_scenes(0, range(500))
    assert (abs(scenes.centre) + scenes.radius[:, None]).max() <= 1


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="split 'test'"):
        Shapes(split="test")  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        Shapes(length=3)[3]


def test_the_fingerprint_tells_contents_apart():
    sets = [Shapes(), Shapes(size=64), Shapes(length=5), Shapes(seed=1), Shapes(split="val")]
    assert len({s.fingerprint() for s in sets}) == 5
    assert Shapes().fingerprint() == Shapes().fingerprint()

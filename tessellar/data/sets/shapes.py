"""Shapes: coloured shapes on plain backgrounds with class labels and captions, drawn from a seed,
at any size.

The embedded default: no files, no download. A scene is a few numbers that depend on (seed, split,
index) alone, in coordinates of [-1, 1], so that the same scene can be drawn at every size. Edges
are anti-aliased by the signed distance of each pixel's centre; shapes are equally frequent.

The data sets as LightningDataModules, to be named in a run's YAML: `class_path:
tessellar.data.ShapesData`.

The base class makes the loaders: a deterministic order from (seed, epoch), whole batches in
training, every sample once in validation, and no draw from the global random numbers, so that the
rest of a run does not depend on its loaders.
"""

from collections.abc import Callable, Sequence
from math import pi, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch

from tessellar.data.batch import Batch
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.dataset import ImageDataset, digest
from tessellar.images import from_uint8
from tessellar.protocol.arguments import in_ranges
from tessellar.randomness import derive, uniforms

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 170, 70),
    "cyan": (50, 190, 210),
    "blue": (50, 80, 210),
    "purple": (140, 60, 180),
    "pink": (245, 130, 180),
}


BACKGROUNDS = {
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "white": (240, 240, 240),
    "brown": (95, 65, 45),
}


# Range of the radius.
SIZES = {"small": (0.5, 0.58), "medium": (0.66, 0.74), "large": (0.82, 0.9)}


SPLITS = ("train", "val")


JITTER = 12.0  # colours vary by up to this many grey levels


DRAWS = 9  # random numbers a scene


def polygon(sides: int, inradius: float) -> Distance:
    """Regular polygon with a vertex at the top."""
    angles = [pi / 2 + pi / sides + 2 * pi * k / sides for k in range(sides)]

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.max([np.cos(a) * x + np.sin(a) * y for a in angles], axis=0) - inradius

    return distance


def circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.95


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.85


def diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (abs(x) + abs(y) - 1) / sqrt(2)


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return abs(np.hypot(x, y) - 0.76) - 0.22


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across = np.maximum(abs(x) - 0.95, abs(y) - 0.3)
    upright = np.maximum(abs(x) - 0.3, abs(y) - 0.95)
    return np.minimum(across, upright)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five tips: the angle is folded to half a tip, bounded by the line from the tip to the inner
    corner.
    """
    angle = (np.arctan2(x, y) + pi / 5) % (2 * pi / 5) - pi / 5
    along = np.hypot(x, y) * np.cos(angle)
    across = np.hypot(x, y) * abs(np.sin(angle))
    corner_along = 0.42 * np.cos(pi / 5)
    corner_across = 0.42 * np.sin(pi / 5)
    edge = np.hypot(1 - corner_along, corner_across)
    return ((along - 1) * corner_across + across * (1 - corner_along)) / edge


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner with half a disc on each upper side."""
    half = 0.8
    corner = (abs(x) + abs(y) - half) / sqrt(2)
    lobes = np.hypot(abs(x) - half / 2, y - half / 2) - half / sqrt(2)
    return np.minimum(corner, lobes)


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.5, y))


# Signed distance to each shape's edge, negative inside, in units of its radius; y points up.
SHAPES: dict[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": polygon(3, 0.52),
    "star": star,
    "cross": cross,
    "ring": ring,
    "diamond": diamond,
    "hexagon": polygon(6, 0.85),
    "heart": heart,
    "crescent": crescent,
}


class Scenes(NamedTuple):
    """What B images show; one row an image."""

    shape: np.ndarray  # int64 [B], as are colour, background and size
    colour: np.ndarray
    background: np.ndarray
    size: np.ndarray
    centre: np.ndarray  # [B, 2] x to the right, y up, in [-1, 1]
    radius: np.ndarray  # [B]
    shade: np.ndarray  # [B, 3] added to the colour


def draw_scenes(seed: int, indices: Sequence[int]) -> Scenes:
    """Scenes of the given indices; the shape is the index modulo 10, everything else is random."""
    u = uniforms(seed, indices, DRAWS)
    size = (u[:, 0] * len(SIZES)).astype(int)
    low, high = np.array(list(SIZES.values()))[size].T
    radius = low + u[:, 1] * (high - low)
    return Scenes(
        shape=np.asarray(indices) % len(SHAPES),
        colour=(u[:, 2] * len(COLOURS)).astype(int),
        background=(u[:, 3] * len(BACKGROUNDS)).astype(int),
        size=size,
        centre=(2 * u[:, 4:6] - 1) * (1 - radius[:, None]),
        radius=radius,
        shade=(2 * u[:, 6:9] - 1) * JITTER,
    )


def render(scenes: Scenes, size: int) -> np.ndarray:
    """The scenes as uint8 [B, size, size, 3]."""
    pixels = (2 * np.arange(size) + 1) / size - 1
    radius = scenes.radius[:, None, None]
    x = (pixels[None, None, :] - scenes.centre[:, 0, None, None]) / radius
    y = (-pixels[None, :, None] - scenes.centre[:, 1, None, None]) / radius
    coverage = np.empty((len(radius), size, size))
    for shape, distance in enumerate(SHAPES.values()):
        rows = scenes.shape == shape
        if rows.any():
            coverage[rows] = distance(*np.broadcast_arrays(x[rows], y[rows]))
    coverage = np.clip(0.5 - coverage * radius * size / 2, 0, 1)[..., None]
    colour = np.array(list(COLOURS.values()))[scenes.colour] + scenes.shade
    background = np.array(list(BACKGROUNDS.values()))[scenes.background]
    image = background[:, None, None] + coverage * (colour - background)[:, None, None]
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def captions(scenes: Scenes) -> list[str]:
    """For example 'a large red circle on a grey background'."""
    sizes = list(SIZES)
    colours = list(COLOURS)
    shapes = list(SHAPES)
    backgrounds = list(BACKGROUNDS)
    texts = []
    for s, c, k, b in zip(scenes.size, scenes.colour, scenes.shape, scenes.background, strict=True):
        texts.append(f"a {sizes[s]} {colours[c]} {shapes[k]} on a {backgrounds[b]} background")
    return texts


class Shapes(ImageDataset):
    """`length` images of `size` x `size` pixels; the splits "train" and "val" share no scene."""

    def __init__(
        self,
        size: int = 32,
        length: int = 20_000,
        seed: int = 0,
        split: Literal["train", "val"] = "train",
    ) -> None:
        if size < 8 or length < 1 or split not in SPLITS:
            raise ValueError(
                f"size {size} must be >= 8, length {length} >= 1, and split {split!r} one of {SPLITS}"
            )
        self.size = size
        self.seed = derive(seed, SPLITS.index(split))
        self.class_names = tuple(SHAPES)
        self.labels = torch.arange(length) % len(SHAPES)

    def batch(self, indices: Sequence[int]) -> Batch:
        scenes = draw_scenes(self.seed, indices)
        pixels = torch.from_numpy(render(scenes, self.size)).permute(0, 3, 1, 2)
        index = torch.as_tensor(indices)
        return {
            "image": from_uint8(pixels).contiguous(),
            "label": self.labels[index],
            "caption": captions(scenes),
            "index": index,
        }

    def fingerprint(self) -> str:
        return digest(set="shapes", version=1, size=self.size, length=len(self), seed=self.seed)


@in_ranges
class ShapesData(ImageDataModule):
    """Procedural coloured shapes; needs no files. `seed` says which shapes; in which order they come
    follows the run's `seed_everything`, outside of runs `seed` as well.
    """

    name = "shapes"
    class_names = tuple(SHAPES)

    def __init__(
        self,
        size: int = 32,
        length: int = 20_000,
        val_length: int = 2_000,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self._follows = True
        for name, value in {"size": size, "length": length, "val_length": val_length}.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}; it must be at least 1")
        self.image_size = (size, size)
        self.content_seed = seed
        self.length = length
        self.val_length = val_length

    def train_dataset(self, augment: bool = True) -> Shapes:
        return Shapes(self.image_size[0], self.length, self.content_seed, "train")

    def val_dataset(self) -> Shapes:
        return Shapes(self.image_size[0], self.val_length, self.content_seed, "val")

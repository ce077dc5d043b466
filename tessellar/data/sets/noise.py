"""Noise as a data set: images of any size that need no files, for a run that is only tried."""

from collections.abc import Sequence

import torch

from tessellar.data.batch import Batch
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.dataset import ImageDataset, digest
from tessellar.randomness import derive

LENGTH = 64


class Noise(ImageDataset):
    """LENGTH images [3, height, width] of uniform noise in [-1, 1], with labels that go round the
    classes and a caption each.
    """

    def __init__(self, image_size: tuple[int, int], num_classes: int) -> None:
        self.image_size = image_size
        self.class_names = tuple(map(str, range(num_classes)))
        self.labels = torch.arange(LENGTH) % num_classes

    def batch(self, indices: Sequence[int]) -> Batch:
        images = []
        for index in indices:
            drawn = torch.Generator().manual_seed(derive(0, index))
            images.append(2 * torch.rand(3, *self.image_size, generator=drawn) - 1)
        index = torch.as_tensor(indices)
        return {
            "image": torch.stack(images),
            "label": self.labels[index],
            "caption": [f"a picture of noise, number {number}" for number in index.tolist()],
            "index": index,
        }

    def fingerprint(self) -> str:
        return digest(set="noise", size=self.image_size, classes=len(self.class_names))


class NoiseData(ImageDataModule):
    """Noise for training and for validation alike."""

    name = "noise"

    def __init__(
        self, image_size: tuple[int, int], num_classes: int = 1000, batch_size: int = 1
    ) -> None:
        super().__init__(batch_size, num_workers=0)
        self.image_size = image_size
        self.class_names = tuple(map(str, range(num_classes)))

    def train_dataset(self, augment: bool = True) -> Noise:
        return Noise(self.image_size, len(self.class_names))

    def val_dataset(self) -> Noise:
        return Noise(self.image_size, len(self.class_names))

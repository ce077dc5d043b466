"""How large the traps of an evaluation are, on shapes and a small generator: labels, reference, resize, JPEG, and
guidance tuned on the seeds that are reported.

    python benchmarks/traps.py EXPORT --extractor NET.safetensors [--count 1000] [--json FILE]

Each row is the same thing measured rightly and wrongly, by one network. Numbers belong to this data set and network:
what carries over is which traps are larger than the differences between papers.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from tessellar.data.sets.shapes import ShapesData
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.generation import GeneratedImages
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import TimmNetwork
from tessellar.evaluation.references import Reference, reference_from
from tessellar.evaluation.sources import DatasetImages, ImageBatch, ImageSource
from tessellar.pipeline import ImageGenerator, load_generator
from tessellar.sampling.settings import Sampling

SCALES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)


class Changed(ImageSource):
    """Images of another source, each batch changed."""

    def __init__(self, source: ImageSource, change: Callable[[Tensor], Tensor]) -> None:
        self.source = source
        self.change = change
        self.name = source.name
        self.count = source.count

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        for batch in self.source.batches(batch_size):
            yield batch._replace(images=self.change(batch.images))

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def as_jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    """What is left of uint8 images [B, 3, H, W] after JPEG."""

    def change(images: Tensor) -> Tensor:
        read = []
        for picture in rearrange(images, "b c h w -> b h w c").numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=quality)
            read.append(np.asarray(Image.open(file)))
        return rearrange(torch.from_numpy(np.stack(read)), "b h w c -> b c h w")

    return change


def distance(source: ImageSource, extractor: Extractor, reference: Reference) -> float:
    record = evaluate_samples(source, extractor, reference, metrics=["fd"])
    return next(iter(record["metrics"].values()))


def with_resize(extractor: TimmNetwork, resize: str) -> TimmNetwork:
    """The network reading larger images through that resize."""
    facts = replace(extractor.facts, resize=resize)  # type: ignore[arg-type]
    return TimmNetwork(facts, extractor.network.state_dict(), extractor.sha256, "")


def rows_of_images(extractor: TimmNetwork, count: int) -> dict[str, list[float]]:
    """Reference, JPEG and resize: training images against others of the same kind."""
    data = ShapesData(size=24, length=4 * count, val_length=count)
    train = DatasetImages(data.train_dataset(augment=False), "shapes", "train")
    validation = DatasetImages(data.val_dataset(), "shapes", "val")
    reference = reference_from(train, extractor)
    plain = distance(validation, extractor, reference)
    rows = {}
    for quality in (95, 75):
        lossy = distance(Changed(validation, as_jpeg(quality)), extractor, reference)
        rows[f"samples saved as JPEG of quality {quality}"] = [plain, lossy]
    small = reference_from(validation, extractor)
    half = DatasetImages(data.train_dataset(augment=False), "shapes", "train", limit=count)
    few = distance(half, extractor, small)
    many = distance(half, extractor, reference)
    rows["training images against themselves; against the validation images"] = [many, few]
    large = ShapesData(size=48, length=4 * count, val_length=count)
    pictures = DatasetImages(large.train_dataset(augment=False), "shapes 48", "train")
    others = DatasetImages(large.val_dataset(), "shapes 48", "val")
    networks = {name: with_resize(extractor, name) for name in ("clean-bicubic", "tf1-bilinear")}
    target = reference_from(pictures, networks["clean-bicubic"])
    right = distance(others, networks["clean-bicubic"], target)
    other = replace(target, extractor={})  # as a foreign file of statistics, which does not say it
    rows["another resize than the reference's"] = [
        right,
        distance(others, networks["tf1-bilinear"], other),
    ]
    return rows


def rows_of_samples(
    model: ImageGenerator, extractor: Extractor, count: int
) -> dict[str, list[float]]:
    """Labels, the number of samples, and tuning on the reported seeds."""
    data = ShapesData(size=24, length=4 * count, val_length=count)
    train = DatasetImages(data.train_dataset(augment=False), "shapes", "train")
    reference = reference_from(train, extractor)

    def measured(scale: float, seed: int, images: int = count, random: bool = False) -> float:
        sampling = Sampling(scale)
        source = GeneratedImages(model, images, sampling, seed, random_classes=random)
        return distance(source, extractor, reference)

    balanced = measured(1.4, 0)
    rows = {
        "labels drawn instead of equally many": [balanced, measured(1.4, 0, random=True)],
        "half as many samples": [balanced, measured(1.4, 0, images=count // 2)],
        "other seeds": [balanced, measured(1.4, 10 * count)],
    }
    few = count // 4
    tuned = {scale: measured(scale, 0, few) for scale in SCALES}
    best = min(tuned, key=lambda scale: tuned[scale])
    fresh = [measured(best, 20 * count + few * place, few) for place in range(4)]
    honest = sum(fresh) / len(fresh)
    rows[f"guidance tuned on the reported seeds ({few} samples, {len(SCALES)} scales)"] = [
        honest,
        tuned[best],
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    extractor = load_extractor(arguments.extractor)
    assert isinstance(extractor, TimmNetwork)
    rows = rows_of_images(extractor, arguments.count)
    rows |= rows_of_samples(load_generator(arguments.model), extractor, arguments.count)
    print(f"{extractor.distance}, {arguments.count} images")
    for name, (right, wrong) in rows.items():
        print(f"{name:<72} {right:9.4f} {wrong:9.4f}  {100 * (wrong / right - 1):+.0f} %")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

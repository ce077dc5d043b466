"""Captions of images by SEED's first stage, which learnt both sides: cosines of the last query's and the text's
features (arXiv 2307.08041), without a probe.
"""

from math import comb
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.checkpoints.reading import load_tokenizer
from tessellar.data import WebDatasetData
from tessellar.evaluation.subset import subset
from tessellar.images import to_uint8
from tessellar.measures.probes import ranks
from tessellar.sampling.grid import picture_grid
from tessellar.tokenizers.seed import SEED
from tessellar.tokenizers.seed.tokenizer import to_right

DEPTHS = (1, 5, 10)
ASKED = 6  # captions in the picture
FOUND = 5  # images of each


class Similarities(NamedTuple):
    """Of M validation images: `images` uint8 [M, 3, H, W], their captions, and the cosine of each image
    (row) with each caption, [M, M].
    """

    images: Tensor
    captions: list[str]
    table: Tensor

    @property
    def groups(self) -> Tensor:
        """Equal numbers for equal captions, int64 [M]."""
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self.captions))}
        return torch.tensor([numbers[caption] for caption in self.captions])


def shards(folder: Path) -> tuple[str, str]:
    """Training and validation shards of Open Clip Art."""
    return str(folder / "train-*.tar"), str(folder / "val.tar")


@torch.no_grad()
def similarities(export: Path, folder: Path, count: int | None = None) -> Similarities:
    """By an export of SEED's contrastive stage, of a fixed random part of the validation images."""
    tokenizer = load_tokenizer(export).eval()
    assert isinstance(tokenizer, SEED)
    train, val = shards(folder)
    data = WebDatasetData(train, tokenizer.image_size[0], val_shards=val).val_dataset()
    places = subset(len(data), count or len(data))
    images = []
    of_images = []
    of_texts = []
    for rows in places.split(100):
        batch = data.batch(rows.tolist())["image"]
        condition = tokenizer.captions.of_texts(data.captions(rows.tolist()))
        assert condition.ids is not None and condition.valid is not None
        images.append(to_uint8(batch))
        of_images.append(tokenizer.image_feature(tokenizer.states(batch)))
        of_texts.append(tokenizer.text_feature(*to_right(condition.ids, condition.valid)))
    table = torch.cat(of_images) @ torch.cat(of_texts).T
    return Similarities(torch.cat(images), data.captions(places.tolist()), table)


def own_retrieval(found: Similarities) -> dict[str, float]:
    """Shares of images whose caption, and of captions whose image, is among the first 1, 5 and 10; equal
    captions are right for each other's images.
    """
    metrics = {}
    for name, table in (("texts", found.table), ("images", found.table.T)):
        before = ranks(table, found.groups)
        for depth in DEPTHS:
            metrics[f"{name} at {depth}"] = float((before < depth).double().mean())
    return metrics


def chance(found: Similarities) -> dict[str, float]:
    """What `own_retrieval` expects of candidates in random order."""
    count = len(found.captions)
    right = (found.groups[:, None] == found.groups).sum(1).tolist()
    metrics = {}
    for depth in DEPTHS:
        drawn = min(depth, count)
        missed = [comb(count - one, drawn) / comb(count, drawn) for one in right]
        metrics[f"texts at {depth}"] = metrics[f"images at {depth}"] = 1 - mean(missed)
    return metrics


def picture(found: Similarities) -> Tensor:
    """Captions with the images that are nearest to each, the best first: uint8 [3, H, W].

    Chosen: the first captions whose image is found at once, then the first whose image is not.
    """
    before = ranks(found.table.T, found.groups)
    right = (before == 0).nonzero()[:, 0].tolist()
    others = (before > 0).nonzero()[:, 0].tolist()
    asked = [*right[: ASKED // 2], *others[: ASKED // 2]]
    rows = []
    labels = []
    for place in asked:
        nearest = found.table[:, place].topk(min(FOUND, len(found.table))).indices
        rows.append(torch.cat([found.images[place : place + 1], found.images[nearest]]))
        labels.append(f"{found.captions[place]} (its image: place {int(before[place]) + 1})")
    columns = ["its image", *[f"found {number}" for number in range(1, rows[0].shape[0])]]
    return picture_grid(rows, row_labels=labels, column_labels=columns)

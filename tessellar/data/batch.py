"""What a data set gives: one sample, and a batch of samples, as typed dictionaries."""

from typing import NotRequired, TypedDict

import torch
from torch import Tensor


class Sample(TypedDict):
    """One image: `image` float32 [3, H, W] in [-1, 1], its `index` in the set, and what the set
    knows about it.
    """

    image: Tensor
    index: int
    label: NotRequired[int]
    caption: NotRequired[str]


class Batch(TypedDict):
    """B samples: `image` float32 [B, 3, H, W], `index` int64 [B], `label` int64 [B], `caption` B
    strings.

    Where the samples are the views of one image, `texts` are all its captions.
    """

    image: Tensor
    index: Tensor
    label: NotRequired[Tensor]
    caption: NotRequired[list[str]]
    texts: NotRequired[list[str]]


class TokenBatch(TypedDict):
    """B samples of a cache: `tokens` as the layout says instead of an image, the rest as in a
    Batch.
    """

    tokens: Tensor
    index: Tensor
    label: NotRequired[Tensor]
    caption: NotRequired[list[str]]


def collate(samples: "Batch | TokenBatch | list[Sample]") -> Batch | TokenBatch:
    """Samples to a batch; a batch that the data set already made (`__getitems__`) passes through.

    Raises ValueError where samples differ in their keys.
    """
    if isinstance(samples, dict):
        return samples
    keys = set(samples[0])
    for sample in samples:
        if set(sample) != keys:
            raise ValueError(
                f"samples of one batch have different keys: {sorted(keys)} and {sorted(sample)}"
            )
    batch: Batch = {
        "image": torch.stack([s["image"] for s in samples]),
        "index": torch.tensor([s["index"] for s in samples]),
    }
    if "label" in keys:
        batch["label"] = torch.tensor([s["label"] for s in samples if "label" in s])
    if "caption" in keys:
        batch["caption"] = [s["caption"] for s in samples if "caption" in s]
    return batch

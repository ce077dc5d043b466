"""What a data set gives: one sample, and a batch of samples, as typed dictionaries.

Loaders of image files hand over uint8, a quarter of the bytes of floats between processes and to
the device; `normalised` makes the images of a batch what models take.
"""

from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from tessellar.images import from_uint8


class Sample(TypedDict):
    """One image: `image` float32 [3, H, W] in [-1, 1] (or uint8, from a stream), its `index` in the
    set, and what the set knows about it.
    """

    image: Tensor
    index: int
    label: NotRequired[int]
    caption: NotRequired[str]


class Batch(TypedDict):
    """B samples: `image` float32 [B, 3, H, W] in [-1, 1] (uint8 as loaders hand them over), `index`
    int64 [B], `label` int64 [B], `caption` B strings.

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


def normalised(batch: Any) -> Any:
    """A batch whose images are float32 in [-1, 1], on whatever device they lie; a batch without
    uint8 images is returned as it is.
    """
    image = batch.get("image") if isinstance(batch, dict) else None
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        return batch
    return {**batch, "image": from_uint8(image)}


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

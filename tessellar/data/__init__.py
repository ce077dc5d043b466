"""Data: every set gives `image` [3, H, W] in [-1, 1], `label`, `caption`, `index`, the same to the bit in any worker.

The names below are looked up on first use, so that `import tessellar.data` stays light (no Lightning).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessellar.data.batch import Batch, Sample, TokenBatch, collate
    from tessellar.data.cached_tokens import CachedTokens, CachedTokensData
    from tessellar.data.datamodule import FashionMNISTData, ImageDataModule, ImageFolderData, ShapesData
    from tessellar.data.fashion_mnist import FashionMNIST
    from tessellar.data.hf_dataset import HFData, HFImages
    from tessellar.data.image_folder import ImageFolder
    from tessellar.data.sampler import ResumableSampler
    from tessellar.data.shapes import Shapes
    from tessellar.data.webdataset_stream import WebDatasetStream, WebDatasetStreamData
    from tessellar.data.webdataset_tar import WebDatasetData, WebDatasetTars

_HOMES = {
    "Batch": "batch",
    "CachedTokens": "cached_tokens",
    "CachedTokensData": "cached_tokens",
    "FashionMNIST": "fashion_mnist",
    "FashionMNISTData": "datamodule",
    "HFData": "hf_dataset",
    "HFImages": "hf_dataset",
    "ImageDataModule": "datamodule",
    "ImageFolder": "image_folder",
    "ImageFolderData": "datamodule",
    "ResumableSampler": "sampler",
    "Sample": "batch",
    "Shapes": "shapes",
    "ShapesData": "datamodule",
    "TokenBatch": "batch",
    "WebDatasetData": "webdataset_tar",
    "WebDatasetStream": "webdataset_stream",
    "WebDatasetStreamData": "webdataset_stream",
    "WebDatasetTars": "webdataset_tar",
    "collate": "batch",
}

__all__ = [
    "Batch",
    "CachedTokens",
    "CachedTokensData",
    "FashionMNIST",
    "FashionMNISTData",
    "HFData",
    "HFImages",
    "ImageDataModule",
    "ImageFolder",
    "ImageFolderData",
    "ResumableSampler",
    "Sample",
    "Shapes",
    "ShapesData",
    "TokenBatch",
    "WebDatasetData",
    "WebDatasetStream",
    "WebDatasetStreamData",
    "WebDatasetTars",
    "collate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

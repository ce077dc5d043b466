"""Data: every set gives `image` [3, H, W] in [-1, 1], `label`, `caption`, `index`, the same to the
bit in any worker.

The names below are looked up on first use, so that `import tessellar.data` stays light (no
Lightning).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tessellar.data.batch import Batch, Sample, TokenBatch, collate
    from tessellar.data.datamodule import ImageDataModule
    from tessellar.data.sampler import ResumableSampler
    from tessellar.data.sets.fashion_mnist import FashionMNIST, FashionMNISTData
    from tessellar.data.sets.hf_dataset import HFData, HFImages
    from tessellar.data.sets.image_folder import ImageFolder, ImageFolderData
    from tessellar.data.sets.shapes import Shapes, ShapesData
    from tessellar.data.tars.webdataset_stream import WebDatasetStream, WebDatasetStreamData
    from tessellar.data.tars.webdataset_tar import WebDatasetData, WebDatasetTars
    from tessellar.data.token_cache.cached_tokens import CachedTokens, CachedTokensData

_HOMES = {
    "Batch": "batch",
    "CachedTokens": "token_cache.cached_tokens",
    "CachedTokensData": "token_cache.cached_tokens",
    "FashionMNIST": "sets.fashion_mnist",
    "FashionMNISTData": "sets.fashion_mnist",
    "HFData": "sets.hf_dataset",
    "HFImages": "sets.hf_dataset",
    "ImageDataModule": "datamodule",
    "ImageFolder": "sets.image_folder",
    "ImageFolderData": "sets.image_folder",
    "ResumableSampler": "sampler",
    "Sample": "batch",
    "Shapes": "sets.shapes",
    "ShapesData": "sets.shapes",
    "TokenBatch": "batch",
    "WebDatasetData": "tars.webdataset_tar",
    "WebDatasetStream": "tars.webdataset_stream",
    "WebDatasetStreamData": "tars.webdataset_stream",
    "WebDatasetTars": "tars.webdataset_tar",
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

"""The runs that `make soak` attacks: tiny models with everything that has a state, on data of every kind."""

import io
import tarfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from PIL import Image

from tessellar.checkpoints.export import export_tokenizer
from tessellar.data.sets.shapes import Shapes
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.images import to_uint8
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

POISONED = (9, 10, 23)  # batches; with two batches an update these are parts of two updates
COUNT = 72  # training images


def tokenizer_model() -> dict[str, Any]:
    """A tiny tokenizer with all that has a state: discriminator, restarted codes, accumulation."""
    tokenizer = {
        "class_path": "tessellar.tokenizers.vit_vq.ViTVQ",
        "init_args": {
            "image_size": 16,
            "width": 16,
            "encoder_depth": 1,
            "decoder_depth": 1,
            "num_heads": 2,
            "quantizer": {
                "class_path": "tessellar.tokenizers.quantizers.vq.VectorQuantizer",
                "init_args": {"vocab_size": 16, "dim": 4, "init_step": 3, "restart_every": 5},
            },
        },
    }
    critic = {
        "class_path": "tessellar.tokenizers.losses.discriminator.PatchGAN",
        "init_args": {"channels": 8, "depth": 1},
    }
    loss = {
        "class_path": "tessellar.tokenizers.losses.tokenizer_loss.TokenizerLoss",
        "init_args": {"discriminator": critic, "adversarial_start": 4},
    }
    return {
        "class_path": "tessellar.training.tokenizer_module.TokenizerModule",
        "init_args": {
            "tokenizer": tokenizer,
            "loss": loss,
            "accumulate": 2,
            "optimizer": {"name": "muon", "lr": 1e-3},
            "schedule": {"decay": "linear", "warmup": 5},
        },
    }


def generator_model() -> dict[str, Any]:
    """A tiny generator with dropout, on the tokens of `tok`."""
    generator = {
        "class_path": "tessellar.models.llamagen.LlamaGen",
        "init_args": {
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "num_classes": 10,
            "ffn_multiple_of": 8,
        },
    }
    return {
        "class_path": "tessellar.training.generator_module.GeneratorModule",
        "init_args": {
            "tokenizer": "tok",
            "generator": generator,
            "optimizer": {"lr": 1e-3},
            "schedule": {"decay": "cosine", "warmup": 3},
        },
    }


def shapes(workers: int) -> dict[str, Any]:
    return {
        "class_path": "tessellar.data.ShapesData",
        "init_args": {
            "size": 16,
            "length": COUNT,
            "val_length": 16,
            "batch_size": 8,
            "num_workers": workers,
        },
    }


def config(
    updates: int, model: dict[str, Any], data: dict[str, Any], poisoned: tuple[int, ...] = POISONED
) -> dict[str, Any]:
    """A run of `updates` that logs each of them, saves every third and validates now and then."""
    poison = {"class_path": "benchmarks.soak_runs.Poison", "init_args": {"batches": list(poisoned)}}
    return {
        "trainer": {
            "max_steps": updates,
            "accelerator": "cpu",
            "check_val_every_n_epoch": None,
            "val_check_interval": 7,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "callbacks": [poison],
        },
        "log_every": 1,
        "save_every": 3,
        "ema": 0.9,
        "model": model,
        "data": data,
    }


class Poison(L.Callback):
    """Makes the first image of some batches NaN, counted over the whole run."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        if pl_module.batches in self.batches and "image" in batch:
            batch["image"][0] = float("nan")


def make_run(kind: str, folder: Path, updates: int, workers: int) -> None:
    """Write `run.yaml` and whatever data that kind of run needs into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("tokenizer", "two"):
        model = tokenizer_model()
        data = shapes(workers)
    else:
        make_tokenizer(folder / "tok")
        model = generator_model()
        data = {"cache": cached, "webdataset": tars, "hf": table}[kind](folder)
        data["init_args"]["num_workers"] = workers
    if kind == "two":
        data["init_args"]["batch_size"] = 4
    (folder / "run.yaml").write_text(yaml.safe_dump(config(updates, model, data)))


def make_tokenizer(folder: Path) -> ViTVQ:
    """The export of a tokenizer with random weights, at `folder` of the runs' folder."""
    torch.manual_seed(0)
    tokenizer = ViTVQ(
        VectorQuantizer(16, 4),
        image_size=16,
        patch_size=4,
        width=16,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=2,
    ).eval()
    export_tokenizer(tokenizer, folder)
    return tokenizer


def cached(folder: Path) -> dict[str, Any]:
    """Tokens of shapes, as `convert.py cache` writes them."""
    tokenizer = make_tokenizer(folder / "tok_of_cache")
    for split, length in (("train", COUNT), ("val", 16)):
        dataset = Shapes(size=16, length=length, split=split)  # type: ignore[arg-type]
        encode_dataset(tokenizer, dataset, folder / "cache" / split, name="shapes")
    return {
        "class_path": "tessellar.data.CachedTokensData",
        "init_args": {"root": "cache", "batch_size": 8},
    }


def pictures() -> list[tuple[bytes, int]]:
    """PNG files of shapes and their classes."""
    found = []
    dataset = Shapes(size=16, length=COUNT + 16)
    batch = dataset.batch(range(len(dataset)))
    for image, label in zip(to_uint8(batch["image"]), dataset.labels, strict=True):
        content = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
        found.append((content.getvalue(), int(label)))
    return found


def tars(folder: Path) -> dict[str, Any]:
    """Two WebDataset tars."""
    (folder / "tars").mkdir()
    for number in range(2):
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as tar:
            for place, (content, label) in enumerate(pictures()[number::2]):
                for suffix, member in (("png", content), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{place:04d}.{suffix}")
                    info.size = len(member)
                    tar.addfile(info, io.BytesIO(member))
    return {
        "class_path": "tessellar.data.WebDatasetData",
        "init_args": {
            "shards": "tars/*.tar",
            "size": 16,
            "val_share": 0.2,
            "num_classes": 10,
            "batch_size": 8,
        },
    }


def table(folder: Path) -> dict[str, Any]:
    """A data set of the package `datasets`, as its `save_to_disk` writes one."""
    import datasets  # type: ignore[import-not-found]

    found = pictures()
    columns = {
        "image": [{"bytes": content, "path": None} for content, _ in found],
        "label": [label for _, label in found],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(str(folder / "table"))
    return {
        "class_path": "tessellar.data.HFData",
        "init_args": {"path": "table", "size": 16, "val_share": 0.2, "batch_size": 8},
    }

"""Does the text matter? The likelihood of images under their own captions and under those of other images.

    python benchmarks/caption_control.py runs/oca-t2i/export runs/oca-control/export --data 'DIR/val.tar' [--size 64]

For each model (the first trained on right captions, others as controls), mean nats an image of validation tokens given
the image's own caption, the caption of another image (every image gets one, `--rounds` different ones), and no caption.
`gain` is other minus own: what the caption tells about the image. A control trained on shuffled captions has a gain
of about 0. `wins` is the share of images that their own caption makes likelier than another's: chance is a half.
`sigmas` is the gain over its standard error over images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.data.datamodule import ImageDataModule
from tessellar.data.tars.webdataset_tar import WebDatasetData
from tessellar.errors import UserError
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.pipeline import ImageGenerator, load_generator
from tessellar.protocol.condition import Condition
from tessellar.text.conditioners import TextConditioner


@torch.no_grad()
def nats(model: ImageGenerator, tokens: Tensor, condition: Condition, batch: int = 64) -> Tensor:
    """Nats an image [N] of tokens [N, L] given a condition of N rows, among image codes; text itself is left out."""
    generator, found = model.generator, []
    if not isinstance(generator, PrefixTransformer):
        raise UserError(f"{type(generator).__name__} gives no likelihood of an image in one pass")
    for rows in torch.arange(len(tokens)).split(batch):
        logits = generator.score(tokens[rows], condition.select(rows)).logits  # type: ignore[attr-defined]
        order = generator.entities.order
        losses = torch.nn.functional.cross_entropy(
            logits.mT, tokens[rows][:, order], reduction="none"
        )
        found.append(losses.double().sum(1))
    return torch.cat(found)


def others(count: int, rounds: int) -> list[Tensor]:
    """`rounds` ways to give every one of `count` images another's caption."""
    draw = torch.Generator().manual_seed(0)
    place = torch.randperm(count, generator=draw)
    return [place[(place.argsort() + 1 + number) % count] for number in range(rounds)]


@torch.no_grad()
def measure(
    model: ImageGenerator, data: ImageDataModule, count: int, rounds: int
) -> dict[str, Any]:
    """What captions tell this model about validation images."""
    conditioner = model.conditioner
    if not isinstance(conditioner, TextConditioner):
        raise UserError("this generator reads no captions")
    dataset = data.val_dataset()
    step = max(1, len(dataset) // count)
    batches = [
        dataset.batch(part.tolist())
        for part in torch.arange(0, len(dataset), step)[:count].split(64)
    ]
    tokens = torch.cat([model.tokenizer.encode(batch["image"]) for batch in batches])
    texts = [text for batch in batches for text in batch.get("caption", [])]
    condition = conditioner.of_texts(texts)
    own = nats(model, tokens, condition)
    swapped = torch.stack(
        [nats(model, tokens, condition.select(order)) for order in others(len(texts), rounds)]
    )
    without = nats(model, tokens, model.generator.null(condition))
    gains = swapped.mean(0) - own
    return {
        "images": len(texts),
        "own": float(own.mean()),
        "other": float(swapped.mean()),
        "none": float(without.mean()),
        "gain": float(gains.mean()),
        "sigmas": float(gains.mean() / (gains.std() / len(gains) ** 0.5)),
        "wins": float((swapped > own).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", help="exports or checkpoints of generators that read captions"
    )
    parser.add_argument(
        "--data", required=True, help="WebDataset tars with captions, such as 'DIR/val.tar'"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--count", type=int, default=400, help="images, spread evenly over the tars"
    )
    parser.add_argument("--rounds", type=int, default=2, help="other captions an image")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    given = parser.parse_args()
    data = WebDatasetData(given.data, given.size, val_shards=given.data, flip=False)
    found = {
        path: measure(load_generator(path), data, given.count, given.rounds)
        for path in given.models
    }
    text = json.dumps(found, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

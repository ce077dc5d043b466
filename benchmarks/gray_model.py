"""A small generator of gray levels, for measuring decoding algorithms on laws that were learned from images.

    python benchmarks/gray_model.py --fashion DIR --out gray.safetensors [--updates 500]

Fashion-MNIST in 16 x 16 pixels of 16 levels, a token each: 256 tokens that depend on each other as neighbouring pixels
do, and no tokenizer to train. LlamaGen of width 96 and depth 3; some minutes of one processor.
"""

import argparse
import time

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tessellar.data import FashionMNISTData
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, grid_layout

SIDE = 16
LEVELS = 16


def gray_model() -> LlamaGen:
    """The generator, untrained."""
    torch.manual_seed(0)
    return LlamaGen(
        grid_layout(SIDE, SIDE, Categorical(LEVELS)),
        width=96,
        depth=3,
        num_heads=4,
        num_classes=10,
        dropout=0.0,
        zero_init_residual=True,
    )


def load_gray(path: str) -> LlamaGen:
    """The generator that `main` left at `path`."""
    model = gray_model()
    model.load_state_dict(load_file(path))
    return model.eval()


def levels_of(images: Tensor) -> Tensor:
    """Tokens [B, 256] of images [B, 3, H, W] in [-1, 1]."""
    small = F.interpolate(images[:, :1], (SIDE, SIDE), mode="area")
    return ((small + 1) / 2 * LEVELS).long().clamp(0, LEVELS - 1).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fashion", required=True, help="folder of the data set")
    parser.add_argument("--out", required=True)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    model = gray_model().train()
    data = FashionMNISTData(arguments.fashion).train_dataset()
    stream = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=arguments.updates, pct_start=0.1
    )
    started = time.process_time()
    for update in range(arguments.updates):
        chosen = torch.randint(len(data), (arguments.batch,), generator=stream).tolist()
        batch = data.batch(chosen)
        condition = Condition(ids=data.labels[chosen])
        loss = model.loss(levels_of(batch["image"]), condition)["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 50 == 0 or update == arguments.updates - 1:
            spent = time.process_time() - started
            print(
                f"update {update}: {float(loss.detach()):.3f} nats a token, {spent:.0f} s",
                flush=True,
            )
            save_file(model.state_dict(), arguments.out)


if __name__ == "__main__":
    main()

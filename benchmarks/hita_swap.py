"""What Hita's holistic tokens carry: images with the patches of one picture and the holistic tokens of another.

    python benchmarks/hita_swap.py EXPORT --data DIR [--images 500] [--out DIR]

DIR holds Fashion-MNIST (IDX files) or tars (val.tar). Measured over random pairs of host and donor: how far colour
statistics (mean and deviation of each channel) move from the host's to the donor's (0 stays, 1 arrives), and how the
edges of the result correlate with the host's and with the donor's. Controls: the same numbers against another picture
than the donor, and holistic tokens drawn at random. Writes `swap.json` and `swap.png` (hosts, donors, swapped).
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image

from tessellar.data import WebDatasetData
from tessellar.data.sets.fashion_mnist import FashionMNIST
from tessellar.errors import UserError
from tessellar.pipeline import load
from tessellar.tokenizers.hita import Hita


def read_images(folder: Path, side: int, count: int) -> Tensor:
    """Validation images [B, 3, H, W] in [-1, 1]."""
    if list(folder.glob("*.tar")):
        data = WebDatasetData(
            str(folder / "val.tar"), side, val_shards=str(folder / "val.tar")
        ).val_dataset()
    else:
        data = FashionMNIST(folder, "test")
    places = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
    return data.batch(places.tolist())["image"]


def colours(images: Tensor) -> Tensor:
    """Mean and deviation of each channel [B, 6]."""
    flat = images.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], 1)


def moved(host: Tensor, result: Tensor, donor: Tensor) -> float:
    """Share of the way from host to donor, least squares over all pairs and statistics."""
    way = donor - host
    return float(((result - host) * way).sum() / way.square().sum())


def edges(images: Tensor) -> Tensor:
    """Gradient magnitude [B, h w], centred."""
    grey = images.mean(1, keepdim=True)
    dx, dy = grey[..., 1:, 1:] - grey[..., 1:, :-1], grey[..., 1:, 1:] - grey[..., :-1, 1:]
    size = (dx.square() + dy.square()).sqrt().flatten(1)
    return size - size.mean(1, keepdim=True)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(edges(one), edges(other), dim=1).mean())


@torch.no_grad()
def measure(made: Hita, images: Tensor) -> tuple[dict[str, dict[str, float]], Tensor]:
    """Numbers of swaps and of both controls, and the swapped images."""
    count = len(images)
    tokens = torch.cat([made.encode(part) for part in images.split(100)])
    donors, stranger = images.roll(1, 0), images.roll(2, 0)
    draw = torch.Generator().manual_seed(1)
    noise = (torch.rand(count, made.layout.length, generator=draw) * made.layout.vocab()).long()

    def decoded(donor: Tensor) -> Tensor:
        pairs = zip(tokens.split(100), donor.split(100), strict=True)
        return torch.cat([made.swap_holistic(a, b) for a, b in pairs]).clamp(-1, 1)

    plain, swapped, random = decoded(tokens), decoded(tokens.roll(1, 0)), decoded(noise)
    results = {"swapped": (swapped, donors), "swapped, against a stranger": (swapped, stranger)}
    results["random holistic tokens"] = (random, donors)
    numbers = {
        name: {
            "colour_moved": moved(colours(plain), colours(result), colours(target)),
            "edges_with_host": correlation(result, images),
            "edges_with_target": correlation(result, target),
        }
        for name, (result, target) in results.items()
    }
    return numbers, swapped


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("outputs/hita_swap"))
    arguments = parser.parse_args()
    made = load(str(arguments.export))
    if not isinstance(made, Hita):
        raise UserError(f"{arguments.export} is no Hita tokenizer")
    images = read_images(arguments.data, made.image_size[0], arguments.images)
    numbers, swapped = measure(made, images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "swap.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    for name, row in numbers.items():
        print(f"{name:<30}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    rows = torch.cat([images[:12], images.roll(1, 0)[:12], swapped[:12]])
    save_image((rows + 1) / 2, arguments.out / "swap.png", nrow=12)


if __name__ == "__main__":
    main()

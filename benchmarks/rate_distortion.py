"""A tokenizer whose prefixes decode, beside JPEG and WebP at equal bytes: PSNR against bytes an image.

    python benchmarks/rate_distortion.py EXPORT --shards 'DIR/val.tar' [--images 400] [--out DIR]

Tokens are counted as packed bits without entropy coding; JPEG and WebP as their files, headers included (a 64-pixel
JPEG is mostly header, so the curve of JPEG without its tables, which a decoder could hold, stands beside it). Writes
`rate_distortion.json` and `rate_distortion.png`.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tessellar.data import WebDatasetData
from tessellar.errors import UserError
from tessellar.images import from_uint8, to_uint8
from tessellar.pipeline import load
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.parts.prefix_length import candidates, prefix_bytes

QUALITIES = (1, 5, 10, 20, 30, 50, 70, 90)
Point = tuple[float, float]  # mean bytes an image, mean PSNR in dB


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """PSNR in dB [B] of uint8 images [B, 3, H, W]."""
    error = (one.double() - other.double()).square().flatten(1).mean(1).clamp(min=1e-3)
    return 10 * (255**2 / error).log10()


def of_codec(images: Tensor, codec: str, quality: int, header: int = 0) -> Point:
    """Mean bytes (less `header`) and PSNR of images saved and read by pillow."""
    sizes, back = [], []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, codec, quality=quality)
        sizes.append(len(buffer.getvalue()) - header)
        back.append(
            torch.from_numpy(np.asarray(Image.open(buffer).convert("RGB")).copy()).permute(2, 0, 1)
        )
    return float(np.mean(sizes)), float(psnr(images, torch.stack(back)).mean())


def empty_jpeg(side: int) -> int:
    """Bytes of a JPEG of one colour: what its headers and tables take."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(buffer, "JPEG", quality=50)
    return len(buffer.getvalue())


@torch.no_grad()
def of_tokenizer(tokenizer: Tokenizer, images: Tensor) -> list[Point]:
    """Points of its prefixes."""
    tokens = torch.cat([tokenizer.encode(from_uint8(part)) for part in images.split(100)])
    points = []
    for length in candidates(tokenizer.layout):
        decoded = torch.cat(
            [to_uint8(tokenizer.decode(part[:, :length])) for part in tokens.split(100)]
        )
        points.append(
            (float(prefix_bytes(tokenizer.layout, length)), float(psnr(images, decoded).mean()))
        )
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--shards", required=True, help="tars of validation images")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("outputs/rate_distortion"))
    arguments = parser.parse_args()
    tokenizer = load(str(arguments.export))
    if not isinstance(tokenizer, Tokenizer) or tokenizer.layout.min_prefix is None:
        raise UserError(f"{arguments.export} is no tokenizer whose prefixes decode")
    data = WebDatasetData(
        arguments.shards, tokenizer.image_size[0], val_shards=arguments.shards
    ).val_dataset()
    images = to_uint8(data.batch(list(range(min(arguments.images, len(data)))))["image"])
    header = empty_jpeg(tokenizer.image_size[0])
    codecs: dict[str, Callable[[int], Point]] = {
        "JPEG": lambda q: of_codec(images, "JPEG", q),
        f"JPEG less {header} bytes of headers": lambda q: of_codec(images, "JPEG", q, header),
        "WebP": lambda q: of_codec(images, "WEBP", q),
    }
    curves = {arguments.export.parent.name: of_tokenizer(tokenizer, images)}
    curves |= {name: [point(q) for q in QUALITIES] for name, point in codecs.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "rate_distortion.json").write_text(
        json.dumps(curves, indent=1) + "\n", encoding="utf-8"
    )
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
        print(name, " ".join(f"{size:.0f}B:{quality:.1f}dB" for size, quality in points))
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"bytes an image of {tokenizer.image_size[0]} pixels")
    axes.set_ylabel("PSNR, dB")
    axes.legend(fontsize=8)
    figure.savefig(arguments.out / "rate_distortion.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()

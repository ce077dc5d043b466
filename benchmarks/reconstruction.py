"""Tokenizers side by side on Fashion-MNIST: what a token holds, what is lost, what a prefix is worth.

    python benchmarks/reconstruction.py RUN [RUN ...] --data DIR --extractor FILE [--images 10000] [--out DIR]

Each RUN is a folder of train.py. Reconstructions of the test images: PSNR, SSIM, the Fréchet distance over the given
network (its name stands in the table), usage of every codebook, images a second to encode and decode in float32 (this
machine, one batch at a time), and the share of tokens that bfloat16 encoding leaves as they are. Where a prefix can be
decoded, PSNR and distance against its length (`prefix.png`). Rows are kept in `results.json` and skipped when there.
"""

import argparse
import json
import time
from math import log2
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tessellar.data.sets.fashion_mnist import FashionMNIST
from tessellar.errors import UserError
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.generation import Reconstructions
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.references import Reference, reference_from
from tessellar.evaluation.sources import DatasetImages
from tessellar.images import from_uint8
from tessellar.pipeline import load
from tessellar.protocol.layout import Categorical, Continuous, Factorized
from tessellar.protocol.tokenizer import Tokenizer

BATCH = 250


class Prefixes(Tokenizer):
    """A tokenizer of which only the first `length` tokens are decoded."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        super().__init__()
        self.inner, self.length = tokenizer, length
        self.layout, self.image_size = tokenizer.layout, tokenizer.image_size

    def encode(self, images: Tensor) -> Tensor:
        return self.inner.encode(images)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.inner.decode(tokens[:, : self.length])

    def forward(self, images: Tensor) -> Any:
        return self.inner(images)

    @property
    def last_layer(self) -> Tensor:
        return self.inner.last_layer


def bits(tokenizer: Tokenizer) -> float | None:
    """Bits of an image's tokens at a uniform law; None for latents."""
    total = 0.0
    for segment in tokenizer.layout.segments:
        match segment.kind:
            case Categorical(vocab):
                total += segment.length * log2(vocab)
            case Factorized(vocabs):
                total += segment.length * sum(map(log2, vocabs))
            case Continuous():
                return None
            case kind:
                total += segment.length * kind.n
    return total


@torch.no_grad()
def usage(tokenizer: Tokenizer, tokens: Tensor) -> list[float]:
    """Share of the codes that occur, a codebook (segments with equal vocabularies that share one count together)."""
    if not tokenizer.layout.is_categorical:
        return []
    starts = tokenizer.layout.starts
    found: dict[str, tuple[int, set[int]]] = {}
    for segment, a, b in zip(tokenizer.layout.segments, starts[:-1], starts[1:], strict=True):
        assert isinstance(segment.kind, Categorical)
        book = "scale" if segment.name.startswith("scale") else segment.name
        seen = found.setdefault(book, (segment.kind.vocab, set()))[1]
        seen.update(tokens[:, a:b].unique().tolist())
    return [len(seen) / vocab for vocab, seen in found.values()]


@torch.no_grad()
def speeds(tokenizer: Tokenizer, images: Tensor) -> tuple[float, float]:
    """Images a second to encode and to decode, the faster of two."""
    tokens = tokenizer.encode(images)
    best = [float("inf")] * 2
    for _ in range(2):
        for which, run in enumerate(
            (lambda: tokenizer.encode(images), lambda: tokenizer.decode(tokens))
        ):
            started = time.perf_counter()
            run()
            best[which] = min(best[which], time.perf_counter() - started)
    return len(images) / best[0], len(images) / best[1]


@torch.no_grad()
def agreement(tokenizer: Tokenizer, images: Tensor) -> float | None:
    """Share of tokens that encoding in bfloat16 leaves as float32 has them."""
    if not tokenizer.layout.is_categorical:
        return None
    plain = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        return float((tokenizer.encode(images) == plain).double().mean())


def measured(
    tokenizer: Tokenizer, source: DatasetImages, extractor: Extractor, reference: Reference
) -> dict[str, float]:
    """Metrics of reconstructions against their originals."""
    metrics = ("fd", "paired")
    return evaluate_samples(
        Reconstructions(tokenizer, source), extractor, reference, metrics=metrics, batch_size=BATCH
    )["metrics"]


def lengths(tokenizer: Tokenizer) -> list[int]:
    """Powers of two from the shortest prefix to all tokens; whole scales of a pyramid."""
    layout = tokenizer.layout
    if layout.min_prefix is None:
        return []
    if len(layout.segments) > 1:
        return list(layout.starts[1:])
    doubled = [1 << i for i in range(layout.length.bit_length())]
    return [n for n in doubled if layout.min_prefix <= n <= layout.length]


def row(
    run: Path,
    images: DatasetImages,
    few: DatasetImages,
    extractor: Extractor,
    references: list[Reference],
) -> dict:
    """One tokenizer's numbers."""
    tokenizer = load(str(run / "export"))
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"{run} is not a run of a tokenizer")
    facts = json.loads((run / "run.json").read_text())
    batches = [from_uint8(batch.images) for batch in few.batches(BATCH)]
    with torch.no_grad():
        tokens = torch.cat([tokenizer.encode(batch) for batch in batches])
    encode, decode = speeds(tokenizer, batches[0])
    curve = {
        n: measured(Prefixes(tokenizer, n), few, extractor, references[1])
        for n in lengths(tokenizer)
    }
    return {
        "run": run.name,
        "tokens": str(tokenizer.layout),
        "positions": tokenizer.layout.length,
        "bits": bits(tokenizer),
        "parameters": sum(p.numel() for p in tokenizer.parameters() if p.requires_grad),
        "metrics": measured(tokenizer, images, extractor, references[0]),
        "usage": usage(tokenizer, tokens),
        "encode_images_a_second": encode,
        "decode_images_a_second": decode,
        "bf16_agreement": agreement(tokenizer, torch.cat(batches[:2])),
        "prefixes": curve,
        "training": {name: facts.get(name) for name in ("updates", "samples_seen", "cpu_seconds")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row a tokenizer."""
    distance = next(name for name in rows[0]["metrics"] if "D(" in name)
    lines = [
        f"| run | positions | bits | parameters | PSNR | SSIM | {distance} | usage | encode, decode images/s |"
        " bf16 tokens | updates | samples | CPU-s |",
        "|---" * 13 + "|",
    ]
    for r in rows:
        metrics = {name.lower(): value for name, value in r["metrics"].items()}
        cells = [
            r["run"],
            str(r["positions"]),
            "-" if r["bits"] is None else f"{r['bits']:.0f}",
            f"{r['parameters']:,}",
        ]
        cells += [
            f"{metrics['psnr']:.2f}",
            f"{metrics['ssim']:.3f}",
            f"{r['metrics'][distance]:.2f}",
        ]
        cells.append(", ".join(f"{u:.0%}" for u in r["usage"]) or "-")
        cells.append(f"{r['encode_images_a_second']:.0f}, {r['decode_images_a_second']:.0f}")
        cells.append("-" if r["bf16_agreement"] is None else f"{r['bf16_agreement']:.1%}")
        cells += [f"{value:,.0f}" if value is not None else "" for value in r["training"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR and distance against the length of the prefix."""
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2)
    for r in rows:
        if not r["prefixes"]:
            continue
        x = [int(n) for n in r["prefixes"]]
        found = list(r["prefixes"].values())
        left.plot(
            x,
            [next(v for k, v in m.items() if k.lower() == "psnr") for m in found],
            "o-",
            label=r["run"],
        )
        right.plot(
            x, [next(v for k, v in m.items() if "D(" in k) for m in found], "o-", label=r["run"]
        )
    for axes, name in ((left, "PSNR, dB"), (right, "Fréchet distance")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens decoded")
        axes.set_ylabel(name)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", required=True, help="file of the feature network")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=2_000, help="images for usage and prefixes")
    parser.add_argument("--out", type=Path, default=Path("outputs/tokenizers"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    extractor, data = load_extractor(arguments.extractor), FashionMNIST(arguments.data, "test")
    sources = [
        DatasetImages(data, "fashion-mnist", "test", count)
        for count in (arguments.images, arguments.few)
    ]
    references = [reference_from(source, extractor, arguments.out / "cache") for source in sources]
    path = arguments.out / "results.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for run in arguments.runs:
        if run.name not in (r["run"] for r in rows):
            rows.append(row(run, sources[0], sources[1], extractor, references))
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(table(rows).splitlines()[-1], flush=True)
    (arguments.out / "table.md").write_text(table(rows), encoding="utf-8")
    plot(rows, arguments.out / "prefix.png")


if __name__ == "__main__":
    main()

"""How cost grows: decoding with length and batch, a training step with length, a token cache with images.

    python benchmarks/growth.py [--tiny] [--plot docs/pictures/growth.png] [--json FILE]

LlamaGen of width 384 and 6 layers, random weights, 1,024 codes, float32, one thread: CPU milliseconds of the last steps
of a sequence of 256 to 4,096 tokens (a cache that is full but for them), of a step for 1 to 32 images, of a training
step of 64 to 1,024 tokens, and bytes of caches of 64 to 1,024 images. Each picture draws the slope that is expected
through the last point, where fixed costs count least: flat or linear. Rounds are interleaved over all points
and minima count.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rounds import interleaved, machine  # benchmarks/rounds.py

from tessellar.data import ShapesData
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.layers.kv_cache import KVCache
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.sampling.prepare import prepared
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

CODES = 1024
GUIDANCE = Guidance(Constant(2.0))
STEPS = 8  # of which the time is taken


def model(side: int, tiny: bool) -> LlamaGen:
    torch.manual_seed(0)
    layout = grid_layout(side, side, Categorical(CODES))
    sizes = (64, 2, 2) if tiny else (384, 6, 6)
    return LlamaGen(layout, *sizes, num_classes=10, ffn_multiple_of=8).eval()


def last_steps(generator: LlamaGen, batch: int) -> Callable[[], None]:
    """The last STEPS steps of a sequence: its cache counts as filled with what was decoded."""
    count = generator.layout.length
    tokens = torch.zeros(batch, count, dtype=torch.int64)
    state = generator.start(Condition(ids=torch.zeros(batch, dtype=torch.int64)), GUIDANCE)
    cache = state.cache
    assert isinstance(cache, KVCache)
    fed = torch.full((batch,), count - STEPS)

    def work() -> None:
        cache.lengths = torch.full_like(cache.lengths, count - STEPS)
        cache.block[:, : count - STEPS] = torch.arange(count - STEPS)
        state.fed = fed
        with torch.inference_mode(), prepared(generator):
            for _ in range(STEPS):
                generator.predict(state, tokens)

    return work


def training_step(side: int, tiny: bool) -> Callable[[], None]:
    generator = model(side, tiny).train()
    tokens = torch.zeros(2, side * side, dtype=torch.int64)
    condition = Condition(ids=torch.zeros(2, dtype=torch.int64))

    def work() -> None:
        generator.zero_grad()
        generator.loss(tokens, condition)["cross_entropy"].backward()

    return work


def decoding_by_length(tiny: bool, rounds: int) -> dict[int, float]:
    sides = (4, 8) if tiny else (16, 32, 64)
    ways = {str(side * side): last_steps(model(side, tiny), 1) for side in sides}
    return {int(n): 1e3 * one.cpu / STEPS for n, one in interleaved(ways, rounds).items()}


def decoding_by_batch(tiny: bool, rounds: int) -> dict[int, float]:
    generator = model(4 if tiny else 16, tiny)
    batches = (1, 2) if tiny else (1, 4, 8, 16, 32)
    ways = {str(batch): last_steps(generator, batch) for batch in batches}
    return {int(n): 1e3 * one.cpu / STEPS for n, one in interleaved(ways, rounds).items()}


def training_by_length(tiny: bool, rounds: int) -> dict[int, float]:
    sides = (4, 8) if tiny else (8, 16, 24, 32)
    ways = {str(side * side): training_step(side, tiny) for side in sides}
    return {int(n): 1e3 * one.cpu for n, one in interleaved(ways, rounds).items()}


def cache_by_images(tiny: bool) -> dict[int, float]:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(64, 4), 16, 4, 16, 1, 1, 2).eval()
    found = {}
    for count in (16, 32) if tiny else (64, 256, 1024):
        data = ShapesData(size=16, length=count, val_length=16, batch_size=8)
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            encode_dataset(tokenizer, data.train_dataset(augment=False), cache, name="shapes")
            files = (Path(folder) / "cache").rglob("*")
            found[count] = float(sum(file.stat().st_size for file in files if file.is_file()))
    return found


PANELS = {
    "decoding_by_length": ("tokens decoded before", "CPU ms a step, 1 image", "flat"),
    "decoding_by_batch": ("images at once", "CPU ms a step of all", "linear"),
    "training_by_length": ("tokens an image", "CPU ms a step, 2 images", "linear"),
    "cache_by_images": ("images", "bytes", "linear"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Points of each measurement, and the slope that is expected through the last of them."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (name, (across, up, expected)) in zip(
        figure.subplots(2, 2).flat, PANELS.items(), strict=True
    ):
        points = sorted((int(x), y) for x, y in results[name].items())
        xs = [x for x, _ in points]
        ys = [y for _, y in points]
        slope = [ys[-1] * (x / xs[-1] if expected == "linear" else 1) for x in xs]
        axes.loglog(xs, slope, "--", color="grey", label=f"expected: {expected}")
        axes.loglog(xs, ys, "o-", label="measured")
        axes.set(xlabel=across, ylabel=up, title=name.replace("_", " "))
        axes.minorticks_off()
        axes.set_xticks(xs, [f"{x:,}" for x in xs])
        axes.set_yticks(ys, [f"{y:,.3g}" for y in ys])
        axes.set_ylim(min(*ys, *slope) / 1.3, 1.3 * max(ys))
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tiny = arguments.tiny
    results: dict[str, Any] = {
        "machine": machine(),
        "decoding_by_length": decoding_by_length(tiny, arguments.rounds),
        "decoding_by_batch": decoding_by_batch(tiny, arguments.rounds),
        "training_by_length": training_by_length(tiny, arguments.rounds),
        "cache_by_images": cache_by_images(tiny),
    }
    for name in PANELS:
        print(name, "  ".join(f"{x}: {y:,.4g}" for x, y in results[name].items()), flush=True)
    if arguments.plot:
        draw(results, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

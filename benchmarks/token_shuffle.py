"""Token-Shuffle (arXiv 2504.17789): windows of 2 x 2 codes against single codes at the same resolution and width.

    python benchmarks/token_shuffle.py [--size b] [--side 16] [--codes 16384] [--batch 8] [--rounds 3] [--windows 1,2]
    python benchmarks/token_shuffle.py --width 192 --depth 6 --heads 6 --side 8 --codes 512 --batch 64

Random weights, a class prefix; window 1 keeps the MLP blocks, as in the paper. Positions and MACs are computed from
sizes. A training step is forward, backward and AdamW; sampling is a whole image at batch 1. Rounds of all windows are
interleaved and the fastest of each counts; `of_computed` is the measured ratio of training steps over the computed
ratio of operations. The vocabulary head does not shrink with the window. Numbers belong to the machine that made them.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tessellar.models.token_shuffle import TokenShuffle
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import HalfLinear
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.prepare import prepared
from tessellar.sampling.settings import Sampling

SIZES = {"b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1280, 36, 20)}
CLASSES = 1000


def build(given: argparse.Namespace, window: int) -> TokenShuffle:
    """A generator with random weights; the zero-initialised ones too, since zeros may be cheaper."""
    width, depth, heads = (
        (given.width, given.depth, given.heads) if given.width else SIZES[given.size]
    )
    layout = grid_layout(given.side, given.side, Categorical(given.codes))
    torch.manual_seed(0)
    generator = TokenShuffle(
        layout, width, depth, heads, window, num_classes=CLASSES, rotary="grid"
    )
    for parameter in generator.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    return generator.to(given.device)


def training(generator: TokenShuffle, given: argparse.Namespace) -> Callable[[], None]:
    """One update on random tokens."""
    tokens = torch.randint(0, given.codes, (given.batch, given.side**2), device=given.device)
    condition = Condition(ids=torch.arange(given.batch, device=given.device) % CLASSES)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        generator.train()
        with precision(given):
            loss = torch.stack(list(generator.loss(tokens, condition).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(generator: TokenShuffle, given: argparse.Namespace) -> Callable[[], None]:
    """One image, from the prompt to its last code."""
    guidance = HalfLinear(given.guidance).guidance()
    condition = Condition(ids=torch.zeros(1, dtype=torch.int64, device=given.device))

    @torch.no_grad()
    def image() -> None:
        generator.eval()
        with precision(given), prepared(generator):
            Ancestral()(generator, condition, Sampling(), Noise([0], given.device), guidance)

    return image


def precision(given: argparse.Namespace) -> AbstractContextManager:
    return (
        torch.autocast(given.device.type, torch.bfloat16)
        if given.precision == "bf16"
        else nullcontext()
    )


def fastest(
    runs: dict[int, Callable[[], None]], rounds: int, device: torch.device
) -> dict[int, float]:
    """Seconds of each, rounds interleaved, after one round that does not count."""
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for window, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                best[window] = min(best[window], time.perf_counter() - start)
    return best


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Facts and times of every window, and ratios against window 1."""
    generators = {window: build(given, window) for window in given.windows}
    steps = fastest(
        {w: training(g, given) for w, g in generators.items()}, given.rounds, given.device
    )
    for generator in generators.values():
        generator.zero_grad()
    images = fastest(
        {w: sampling(g, given) for w, g in generators.items()}, given.rounds, given.device
    )
    rows: dict[str, Any] = {}
    first = generators[given.windows[0]].work()
    for window, generator in generators.items():
        work = generator.work()
        computed = (first.backbone + first.around) / (work.backbone + work.around)
        faster = steps[given.windows[0]] / steps[window]
        rows[str(window)] = {
            "parameters": sum(p.numel() for p in generator.parameters()),
            "positions": work.positions,
            "positions_share": work.positions / first.positions,
            "backbone_gmacs": work.backbone / 1e9,
            "backbone_share": work.backbone / first.backbone,
            "computed_ratio": computed,
            "step_seconds": steps[window],
            "step_ratio": faster,
            "of_computed": faster / computed,
            "sample_seconds": images[window],
            "sample_ratio": images[given.windows[0]] / images[window],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="b", help="LlamaGen's sizes")
    parser.add_argument("--width", type=int, help="other sizes: width, with --depth and --heads")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--side", type=int, default=16, help="side of the grid of codes")
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=8, help="images of a training step")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="scale while sampling; 1 is none"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--windows", type=lambda text: [int(w) for w in text.split(",")], default=[1, 2]
    )
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    given = parser.parse_args()
    result = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": given.precision,
        "device": torch.cuda.get_device_name(given.device)
        if given.device.type == "cuda"
        else "cpu",
        "windows": compare(given),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

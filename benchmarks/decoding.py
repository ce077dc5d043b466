"""How close plain decoding is to what the hardware allows, and what GSD's own work costs.

    python benchmarks/decoding.py [--tokens 256] [--rounds 3] [--batches 1,8] [--layout auto] [--json FILE]

LlamaGen-B (random weights, 16,384 codes, a class prefix), guidance on: our loop with a prepared generator against a
plain loop of the same model, whose cache is copied at every step and whose attention runs over the full length. Rounds
of both are interleaved and the fastest of each counts. `memory_bound_ms` is what reading every weight once takes at the
speed at which this machine sums a large tensor: no loop at batch 1 is faster. Then SJD and GSD at a window of 16: time
inside and outside the network. Numbers belong to the machine that made them; tests never look at them.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.layers.kv_cache import KVCache, Slots
from tessellar.models.llamagen import LlamaGen, llamagen_b
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import GroupedRatio
from tessellar.sampling.decode import decode_from
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import DEFAULT_RULES, speculative_jacobi

CODES, CHOICE, GUIDANCE = 16384, Choice(top_k=2000), Guidance(Constant(2.0))


class CopiedCache(KVCache):
    """The plain loop's cache: every pass makes new tensors of the full length and attends to all of it."""

    def reserve(self, block: Tensor) -> Slots:
        slots = super().reserve(block)
        visible = torch.arange(self.capacity) < slots.stop
        return slots._replace(mask=visible[None, None, None].to(self.data.device), is_causal=False)

    def write(self, layer: int, slots: Slots, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kept = []
        for which, new in enumerate((k, v)):
            old = self.tensors[layer][which]
            parts = [old[:, :, : slots.start], new.to(old.dtype), old[:, :, slots.stop :]]
            self.tensors[layer][which] = torch.cat(parts, dim=2)
            kept.append(self.tensors[layer][which])
        return kept[0], kept[1]

    @staticmethod
    def of(cache: KVCache) -> "CopiedCache":
        copied = object.__new__(CopiedCache)
        copied.__dict__ = dict(cache.__dict__)
        copied.tensors = [[half.clone() for half in layer] for layer in cache.data]
        return copied

    tensors: list[list[Tensor]]


def model(side: int, dtype: torch.dtype) -> LlamaGen:
    """LlamaGen-B with random weights; parameters in `dtype`, tables in float32."""
    torch.manual_seed(0)
    generator = llamagen_b(grid_layout(side, side, Categorical(CODES))).eval().requires_grad_(False)
    torch.nn.init.normal_(generator.output.weight, std=0.02)
    for parameter in generator.parameters():
        parameter.data = parameter.data.to(dtype)
    return generator


def memory_bound(generator: LlamaGen, dtype: torch.dtype) -> float:
    """Milliseconds to read the weights of one step (all but the table of token embeddings) from memory once."""
    weights = (
        sum(p.numel() for p in generator.parameters()) - generator.token_embedding.weight.numel()
    )
    probe, best = torch.ones(2**27), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        probe.sum()
        best = min(best, time.perf_counter() - started)
    return 1e3 * best * weights * dtype.itemsize / (probe.numel() * probe.itemsize)


def decode(
    generator: LlamaGen, batch: int, tokens: int, copied: bool
) -> tuple[list[float], Tensor]:
    """Seconds of each step, and the tokens."""
    state = generator.start(Condition(ids=torch.arange(batch)), GUIDANCE)
    if copied:
        assert isinstance(state.cache, KVCache)
        state.cache = CopiedCache.of(state.cache)
    seconds, buffer, noise = [], generator.layout.blank(batch), Noise(range(batch))
    started = time.perf_counter()
    for step in decode_from(generator, state, Sampling(choice=CHOICE), noise, buffer, last=tokens):
        now = time.perf_counter()
        seconds.append(now - started)
        started, buffer = now, step.tokens
    return seconds, buffer


def compare(
    dtype: torch.dtype, batch: int, tokens: int, rounds: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Fastest rounds of both loops, their ratio, and the same from the fastest time of every step."""
    generator = model(16, dtype)
    ways: dict[str, tuple[bool, Callable[[], AbstractContextManager[None]]]] = {
        "plain": (True, nullcontext),
        "ours": (False, lambda: prepared(generator, dtype, **options)),
    }
    steps: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (copied, context) in ways.items():
            with context(), torch.inference_mode():
                steps[name].append(decode(generator, batch, tokens, copied)[0])
    total = {name: min(sum(times) for times in runs) for name, runs in steps.items()}
    least = {
        name: sum(min(times) for times in zip(*runs, strict=True)) for name, runs in steps.items()
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "tokens": tokens,
        **{f"{name}_ms_a_step": 1e3 * seconds / tokens for name, seconds in total.items()},
        "memory_bound_ms": memory_bound(generator, dtype),
        "ratio": total["ours"] / total["plain"],
        "ratio_of_fastest_steps": least["ours"] / least["plain"],
    }


def windows(dtype: torch.dtype, batch: int, tokens: int) -> list[dict[str, Any]]:
    """SJD and GSD at a window of 16: milliseconds a pass in the network, outside it, and in GSD's acceptance alone."""
    generator, rows = model(16, dtype), []
    grouped = GroupedRatio(14, 0.15, 0.5, generator.token_embedding.weight.float())
    spent: list[float] = []

    def timed(p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
        started = time.perf_counter()
        probability = grouped(p, q, draft)
        spent.append(time.perf_counter() - started)
        return probability

    for name, rules in (("sjd", DEFAULT_RULES), ("gsd", replace(DEFAULT_RULES, acceptance=timed))):
        recorder, condition = Recorder(), Condition(ids=torch.arange(batch))
        with prepared(generator, dtype), torch.inference_mode():
            speculative_jacobi(
                generator, condition, CHOICE, Noise(range(batch)), GUIDANCE, rules, recorder
            )
        inside, outside = recorder.network_seconds, recorder.seconds - recorder.network_seconds
        row = {
            "algorithm": name,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "passes": recorder.passes,
        }
        row |= {
            "network_ms": 1e3 * inside / recorder.passes,
            "outside_ms": 1e3 * outside / recorder.passes,
        }
        if name == "gsd":
            row["acceptance_ms"] = 1e3 * sorted(spent)[len(spent) // 2]
            row["acceptance_share"] = (
                sorted(spent)[len(spent) // 2] * recorder.passes / recorder.seconds
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--compile", action="store_true", help="compile our blocks (minutes of start-up)"
    )
    parser.add_argument(
        "--layout", default="auto", choices=["auto", "plain", "transposed", "packed", "int8"]
    )
    parser.add_argument("--no-windows", action="store_true", help="leave out SJD and GSD")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}"
    )
    options = {"compile": arguments.compile, "layout": arguments.layout}
    results: dict[str, Any] = {
        "threads": threads,
        "torch": torch.__version__,
        "loops": [],
        "windows": [],
    }
    for dtype in (getattr(torch, name) for name in arguments.dtypes.split(",")):
        for batch in map(int, arguments.batches.split(",")):
            row = compare(dtype, batch, arguments.tokens, arguments.rounds, options)
            results["loops"].append(row)
            print(
                "  ".join(
                    f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                ),
                flush=True,
            )
        if not arguments.no_windows:
            for row in windows(dtype, 1, arguments.tokens):
                results["windows"].append(row)
                text = (
                    f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                )
                print("  ".join(text), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

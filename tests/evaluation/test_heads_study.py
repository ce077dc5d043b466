"""The study of heads: its runs, its tables, and the memory of heads without running them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import steps
from benchmarks.studies.head_memory import PeakBytes, head_memory, parts_of
from benchmarks.studies.heads import HEADS, memory_table, sampling_of, sized, table
from tessellar.models.bar import BAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.open_magvit2 import OpenMAGVIT2AR

SMALL: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


def row(name: str, distance: float, nats: float | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": 1234567,
        "training": {"cpu_seconds": 250.4},
        "guidance": 1.5,
        "metrics": {"FD(a)": distance, "FD(b)": 9.0, "accuracy": 0.81},
        "nats": nats,
        "cost": {"backbone": 64.0, "head": 256.0, "images_per_cpu_second": 30.04},
        "memory": {str(bits): {"parameters": bits, "bytes": 10**bits} for bits in (12, 18, 32)},
    }


def test_a_row_says_how_far_a_head_is_from_the_softmax() -> None:
    lines = table([row("softmax-0", 2.0, 178.6), row("softmax-1", 4.0), row("bar", 7.5)])
    softmax, _, bar = lines.splitlines()[2:5]
    assert softmax == (
        "| softmax-0 | 1,234,567 | 1.5 | 2.00 | 9.00 | 0.67 | 0.81 | 178.6 | 64 | 256 | 30.0 | 250 |"
    )
    assert "| 7.50 | 9.00 | 2.50 |" in bar
    assert lines.endswith("softmax: 3.00 ± 1.41 over 2 seeds")


def test_memory_is_written_with_units() -> None:
    assert memory_table([row("bar", 1.0)]).endswith(
        "| bar | 12 | 1 TB | 18 | 1e+06 TB | 32 | 1e+20 TB |"
    )
    assert sized(999) == "999 B" and sized(2_097_152) == "2.1 MB"


def test_every_head_of_the_study_has_a_run_of_its_own_and_settings_that_exist() -> None:
    names = [head.name for head in HEADS]
    assert len(set(names)) == len(names)
    for head in HEADS:
        training = head.training(Path("runs"))
        assert (steps.ROOT / training.config).is_file()
        assert sampling_of(head, 1.5).guidance.scale == 1.5


def test_a_softmax_grows_with_the_codes_and_a_head_of_bits_does_not() -> None:
    softmax = {bits: head_memory(LlamaGen, SMALL, bits) for bits in (12, 32)}
    assert softmax[12]["parameters"] == 2 * 2**12 * 16  # a table that reads, and one that writes
    assert softmax[32]["parameters"] == 2**20 * softmax[12]["parameters"]
    assert softmax[12]["bytes"] == 2 * 64 * 2**12 * 4  # logits and probabilities of 64 tokens
    two = head_memory(OpenMAGVIT2AR, {**SMALL, "intra_depth": 1}, 32)
    bits = {number: head_memory(BAR, {**SMALL, "head_width": 16}, number) for number in (12, 32)}
    assert two["parameters"] > 4 * 2**16 * 16
    assert bits[32]["parameters"] < 1.2 * bits[12]["parameters"]
    assert bits[32]["bytes"] < 2 * bits[12]["bytes"]


def test_only_tensors_that_live_at_once_are_counted_and_views_are_not() -> None:
    given = torch.empty(100, device="meta")
    with PeakBytes() as peak:
        x = given + 1
        for _ in range(3):
            x = x.view(10, 10).flatten() * 2  # the one before is let go
    assert peak.most == 2 * 400


def test_a_generator_without_a_known_head_is_an_error() -> None:
    with pytest.raises(TypeError, match="Linear has no head"):
        parts_of(torch.nn.Linear(2, 2), 2)

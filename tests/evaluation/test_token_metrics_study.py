"""The study of tokenizer metrics: its runs, its correlations, its tables."""

from itertools import permutations
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.studies import steps
from benchmarks.studies.token_metrics import (
    VARIANTS,
    correlation,
    correlation_table,
    correlations,
    metrics_of,
    rank_correlations,
    table,
)


def row(name: str, psnr: float, distance: float) -> dict[str, Any]:
    return {
        "name": name,
        "variant": {"tokens": 64},
        "training": {"cpu_seconds": 54.4},
        "metrics": {
            "rFD(a)": 2.0,
            "rFD(b)": 3.0,
            "PSNR": psnr,
            "SSIM": 0.9,
            "usage": 0.5,
            "evenness": 0.75,
        },
        "tokens": {
            "bits by position": [3.0, 5.0],
            "swaps": [
                {"alpha": 0.5, "delta": 8, "rFD(a)": 4.0, "rFD(b)": 5.0},
                {"alpha": 1.0, "delta": 8, "rFD(a)": 8.0, "rFD(b)": 7.0},
            ],
        },
        "probes": {"linear(tokens)": 0.8, "purity": 0.3, "purity, shuffled": 0.1},
        "generator": {
            "training": {"cpu_seconds": 110.0},
            "guidance": 1.5,
            "metrics": {"FD(a)": distance, "accuracy(a)": 0.75, "FD(b)": 1.0, "accuracy(b)": 0.7},
        },
    }


def test_every_variant_has_runs_of_its_own_and_configs_that_exist() -> None:
    runs = Path("runs")
    trainings = [one.training() for one in VARIANTS]
    trainings += [one.generator(runs) for one in VARIANTS]
    assert len(VARIANTS) == 8 and len({training.name for training in trainings}) == 16
    for training in trainings:
        assert (steps.ROOT / training.config).is_file() and " " not in training.name
    perturbed = [one for one in VARIANTS if one.swapped]
    assert perturbed and all("Swap" in " ".join(one.training().options) for one in perturbed)
    assert "Swap" not in " ".join(VARIANTS[0].training().options)


def test_correlation_is_spearmans_with_an_exact_p_and_an_interval_around_it() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    distances = [2.0, 1.0, 4.0, 3.0, 5.0]
    found = correlation(values, distances)
    known: Any = spearmanr(values, distances)
    assert found.rho == pytest.approx(known.statistic) == pytest.approx(0.8)
    assert found.low <= found.rho <= found.high and found.low < found.high <= 1
    every = []
    for order in permutations(distances):
        again: Any = spearmanr(values, order)
        every.append(abs(again.statistic) >= 0.8 - 1e-9)
    assert found.p == pytest.approx(sum(every) / len(every))


def test_rank_correlations_are_scipys_with_equal_values_too() -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(4, size=(20, 8)).astype(float)
    y = draw.integers(4, size=(20, 8)).astype(float)
    found = rank_correlations(x, y)
    for row, value in enumerate(found):
        known: Any = spearmanr(x[row], y[row])
        assert value == pytest.approx(known.statistic)
    assert isnan(rank_correlations(np.ones((1, 3)), np.array([[1.0, 2.0, 3.0]]))[0])


def test_a_perfect_order_of_eight_is_as_rare_as_it_can_be() -> None:
    found = correlation(list(range(8)), [-float(x) for x in range(8)])
    assert (found.rho, found.low, found.high) == pytest.approx((-1, -1, -1))
    assert found.p == pytest.approx(2 / 40_320)


def test_a_metric_that_never_differs_has_no_correlation() -> None:
    assert isnan(correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).rho)


def test_metrics_are_those_of_the_network() -> None:
    a = metrics_of(row("x", 20.0, 6.0), "a")
    b = metrics_of(row("x", 20.0, 6.0), "b")
    assert (a["rFD"], a["pFD, mean"], a["pFD over rFD"]) == (2.0, 6.0, 3.0)
    assert (b["rFD"], b["pFD, mean"], b["pFD over rFD"]) == (3.0, 6.0, 2.0)
    assert a["bits of a position"] == 4.0 and a["bits of an image"] == 8.0
    assert a["purity"] == 0.3 and "purity, shuffled" not in a


def test_tables_have_a_row_a_variant_and_a_row_a_metric() -> None:
    rows = [row("x", 20.0, 6.0), row("y", 22.0, 3.0), row("z", 21.0, 5.0)]
    assert table(rows).splitlines()[2] == (
        "| x | 64 | 20.00 | 2 | 3 | 6.00 | 50% | 4.00 | 0.800 | 1.5 | 6.00 | 1.00 | 0.75 | 54 + 110 |"
    )
    lines = correlation_table(correlations(rows)).splitlines()
    assert lines[0] == "| metric | with FD(a) | with FD(b) |"
    psnr = next(line for line in lines if line.startswith("| PSNR"))
    assert psnr.startswith("| PSNR | -1.00 (") and psnr.endswith("| all equal |")

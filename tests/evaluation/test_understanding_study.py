"""The study of tokenizers that understand: its runs, its retrieval, its tables."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import steps
from benchmarks.studies.understanding import SYSTEMS, TEACHER, generator, tokenizers
from benchmarks.studies.understanding_retrieval import (
    Similarities,
    chance,
    own_retrieval,
    picture,
)
from benchmarks.studies.understanding_tables import probe_table, retrieval_table, table

GIVEN = Namespace(runs=Path("runs"), updates=100)


def row(name: str, **probes: float) -> dict[str, Any]:
    return {
        "name": name,
        "tokenizer": [{"cpu_seconds": 40.4}, {"cpu_seconds": 60.0}],
        "generator": {"cpu_seconds": 110.0},
        "metrics": {"PSNR": 20.0, "rFD(a)": 2.0, "rFD(b)": 3.0, "usage": 0.5},
        "layout": "2 tokens",
        "guidance": 1.5,
        "samples": {"FD(a)": 4.0, "accuracy(a)": 0.75, "FD(b)": 1.0, "accuracy(b)": 0.7},
        "probes": {"flat": {}, "mean": probes},
    }


def test_every_system_has_runs_of_its_own_and_configs_that_exist() -> None:
    runs = []
    for system in SYSTEMS:
        stages = tokenizers(system, GIVEN)
        last = stages[-1].folder(GIVEN.runs) / "export"
        runs += [*stages, generator(system, last, 100)]
        assert str(last) in runs[-1].options
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert (steps.ROOT / run.config).is_file()
        assert " " not in run.name and "," not in run.name


def test_stages_share_the_updates_and_start_where_the_last_one_ended() -> None:
    seed = next(system for system in SYSTEMS if system.name == "SEED")
    stages = tokenizers(seed, GIVEN)
    lengths = [stage.options[stage.options.index("--trainer.max_steps") + 1] for stage in stages]
    assert lengths == ["25", "25", "50"]
    assert "--model.init_args.init_from" not in stages[0].options
    for before, stage in zip(stages, stages[1:], strict=False):
        place = stage.options.index("--model.init_args.init_from") + 1
        assert stage.options[place] == str(before.folder(GIVEN.runs) / "export")


def test_what_is_untaught_reads_no_teacher() -> None:
    found = {}
    for system in SYSTEMS:
        words = [word for stage in tokenizers(system, GIVEN) for word in stage.options]
        found[system.name] = str(TEACHER) in words
    taught = [name for name, reads in found.items() if reads]
    assert taught == ["TokenFlow", "MingTok", "SEED", "SEED, without captions", "RecTok"]


@pytest.fixture
def found() -> Similarities:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    # The first two captions are the same: each is right for either image.
    captions = ["a hat", "a hat", "a boot", "a bag"]
    scores = [
        [0.1, 0.9, 0.2, 0.0],
        [0.8, 0.0, 0.3, 0.1],
        [0.2, 0.1, 0.5, 0.6],
        [0.0, 0.2, 0.1, 0.9],
    ]
    return Similarities(images, captions, torch.tensor(scores))


def test_retrieval_both_ways(found: Similarities) -> None:
    own = own_retrieval(found)
    assert own["texts at 1"] == 0.75  # the boot's image is nearer to "a bag"
    assert own["images at 1"] == 1.0
    assert own["texts at 5"] == own["images at 10"] == 1.0
    expected = chance(found)
    # Two have two right ones among four, two have one.
    assert expected["texts at 1"] == expected["images at 1"] == pytest.approx(0.375)
    assert expected["texts at 5"] == 1.0


def test_the_picture_of_retrieval_has_a_row_a_caption(found: Similarities) -> None:
    shown = picture(found)
    assert shown.shape[0] == 3 and shown.dtype == torch.uint8
    # Three that are found at once; then two of those, and two that are not.
    mixed = picture(found._replace(table=found.table[:, [0, 1, 3, 2]]))
    assert 1.2 < mixed.shape[1] / shown.shape[1] < 1.4


def test_tables() -> None:
    rows = [row("x"), row("y", **{"linear(codes)": 0.5, "knn(codes)": 0.25, "linear(pixels)": 0.8})]
    rows[1]["probes"]["mean"] |= {"purity": 0.4, "purity, shuffled": 0.1, "knn(pixels)": 0.7}
    rows[1]["probes"]["flat"]["linear(tokens)"] = 0.6
    assert table(rows).splitlines()[2] == (
        "| x | 2 tokens | 20.00 | 2.00 | 3.00 | 50% | 1.5 | 4.00 | 1.00 | 0.75 | 100 | 110 |"
    )
    lines = probe_table(rows).splitlines()
    assert lines[2] == "| x | - | - | - | - | - | - | - | - |"
    assert lines[3] == "| y | - | - | 0.600 | - | 0.500 / 0.250 | - | 0.400 (0.100) | - |"
    assert lines[-1] == "pixels of y: 0.800 / 0.700"
    scores = {f"{way} at {depth}": 0.125 for way in ("texts", "images") for depth in (1, 5, 10)}
    probes = {f"{name}(codes)": value for name, value in scores.items()}
    shown = retrieval_table({"own": scores, "chance": scores, "probes": {"ViT-VQ": probes}})
    assert shown.splitlines()[-2].startswith("| ViT-VQ, probe of codes | 12.5% | 12.5% |")

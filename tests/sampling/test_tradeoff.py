"""benchmarks/tradeoff.py: every algorithm has rows, what is refused is named, exact and approximate rows are apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tradeoff
from benchmarks.tradeoff import (
    Bench,
    Point,
    Row,
    all_rows,
    best_of,
    distances_of,
    plot,
    points_of,
    run,
    section,
    table,
)
from tessellar.checkpoints.export import export_parts
from tessellar.models.flash import FlashDrafter
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.flash import FlashDrafts
from tessellar.sampling.settings import ALGORITHMS, Sampling
from tests.tiny.image_generators import of_classes

NAMED = {row.name: row for row in all_rows()}
LEFT_OUT = {"MaskGIT", "Redrawn", "DraftModel", "FlashDrafts"}  # other generators, other exports


def bench(model: ImageGenerator, **given: Any) -> Bench:
    sizes: dict[str, Any] = {"images": 0, "timed": 2, "seeds": 2, "batch_size": 5, "bf16": False}
    return Bench(model, (), guidance=1.5, temperature=1.0, **{**sizes, **given})


def result(name: str, evaluations: float, distances: list[float], seconds: float = 0.2) -> Any:
    """A row as it stands in results.json."""
    algorithm = NAMED[name].algorithm
    one = {
        "evaluations_per_image": evaluations,
        "tokens_per_evaluation_where_uncertain": 2.0,
        "seconds_per_image": 2 * seconds,
        "cpu_seconds_per_image": seconds,
    }
    seeds = [{"metrics": {"FD(a)": d, "FD(b)": 2 * d, "accuracy": 0.5}, **one} for d in distances]
    return {
        "name": name,
        "exact": algorithm.exact,
        "generator": "LPD",
        "sampling": Sampling(algorithm=algorithm).describe(),
        "batch_1": one,
        "seeds": seeds,
    }


def test_every_algorithm_without_a_second_export_has_rows_of_its_own() -> None:
    rows = all_rows()
    assert len(NAMED) == len(rows)
    kinds = {type(row.algorithm).__name__ for row in rows}
    assert kinds == {kind.__name__ for kind in ALGORITHMS} - LEFT_OUT


def test_a_drafter_has_a_row_with_its_number_of_drafts(tmp_path: Path) -> None:
    model = of_classes(["a", "b"])
    drafter = FlashDrafter(model.generator.layout, 16, 1, 2, 2, drafts=3, ffn_multiple_of=8)
    drafter.learn_from(model.generator)
    parts = {"tokenizer": model.tokenizer, "generator": drafter, "conditioner": model.conditioner}
    export = export_parts(parts, tmp_path / "drafter")
    (row,) = [row for row in all_rows(str(export)) if row.name.startswith("flash")]
    assert row == Row("flash 3 drafts", FlashDrafts(str(export)))
    measured = bench(model).measure(row)
    assert measured["exact"] and 1 <= measured["batch_1"]["evaluations_per_image"] <= 4


def test_rows_that_are_there_are_not_measured_again_and_refused_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = of_classes(["a", "b"])
    names = ("plain", "siblings 8 x 2", "zipar 1", "pjd 16 c 0.5", "steps 8")
    rows = [NAMED[name] for name in names]
    run(bench(model), rows, tmp_path)
    printed = capsys.readouterr().out
    assert "steps 8 is left out: LlamaGen has an order of its own: leave steps out\n" in printed
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in results] == list(names[:-1])
    assert results[0]["batch_1"]["evaluations_per_image"] == 4
    assert results[2]["batch_1"]["evaluations_per_image"] == 3  # C + (R - 1) window
    assert all(one["batch_1"]["cpu_seconds_per_image"] > 0 for one in results)
    run(bench(model), rows[:-1], tmp_path)
    assert capsys.readouterr().out == ""


def test_exact_rows_approximate_rows_and_learned_steps_are_tables_apart() -> None:
    rows = [
        result("plain", 256, [1.0, 3.0], seconds=0.4),
        result("zipar 4", 64, [4.0]),
        result("steps 8", 8, []),
        result("siblings 16 x 2", 32, [2.0]),
    ]
    exact, approximate, learned = table(rows).split("\n\n")
    assert exact.splitlines()[0] == (
        "| exact | evaluations | fewer by | where uncertain | seconds | CPU-seconds | faster by | FD(a) | FD(b) "
        "| accuracy |"
    )
    assert exact.splitlines()[2:] == [
        "| plain | 256.0 | 1.00 | 2.00 | 0.800 | 0.400 | 1.00 | 2.00 ± 1.41 | 4.00 ± 2.83 | 0.500 |",
        "| siblings 16 x 2 | 32.0 | 8.00 | 2.00 | 0.400 | 0.200 | 2.00 | 2.00 | 4.00 | 0.500 |",
    ]
    assert approximate.splitlines()[2].startswith("| zipar 4 | 64.0 | 4.00 |")
    assert (
        learned.splitlines()[2]
        == "| steps 8 | 8.0 | 32.00 | 2.00 | 0.400 | 0.200 | 2.00 |  |  |  |"
    )


def test_the_curve_goes_through_rows_that_no_other_one_beats() -> None:
    def point(evaluations: float, distance: float) -> Point:
        return Point("approximate", "x", "", evaluations, distance, 0.0)

    points = [point(64, 2.0), point(16, 5.0), point(32, 2.0), point(24, 6.0), point(128, 1.0)]
    assert best_of(points) == [points[1], points[2], points[4]]


def test_the_picture_has_a_panel_of_exact_and_one_of_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = []
    monkeypatch.setattr(tradeoff, "put_labels", lambda _, axes, *__: named.append(axes))
    rows = [
        result("plain", 256, [1.0, 3.0]),
        result("zipar 4", 64, [4.0]),
        result("zipar 1", 30, [7.0]),
        result("steps 8", 8, [3.0]),
    ]
    (first, second) = distances_of(rows)
    assert (first, second) == ("FD(a)", "FD(b)")
    plot(points_of(rows, first), first, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    left, right = (axes.get_legend_handles_labels()[1] for axes in named)
    assert "Ancestral" in left and "plain decoding" in left and "ZipAR" not in left
    assert {"ZipAR", "LPD, learned steps", "best approximate"} <= set(right)
    for alone in (rows[0], rows[1]):
        plot(points_of([alone], first), first, tmp_path / f"{alone['name']}.png")
        assert (tmp_path / f"{alone['name']}.png").is_file()


def test_a_number_of_steps_is_learned_and_plain_decoding_exact() -> None:
    assert section(result("steps 8", 8, [])) == "learned"
    assert section(result("plain", 8, [])) == "exact"

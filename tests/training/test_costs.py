"""The cost table of the docs is what the configs give."""

from pathlib import Path

import pytest

from benchmarks.costs import ROOT, Cost, cost, kept, row, with_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cost.md"


@pytest.mark.parametrize("name", ["demo/tokenizer", "imagenet256/llamagen_b"])
def test_a_row_of_the_page_is_made_from_its_config(name: str) -> None:
    assert row(cost(ROOT / f"{name}.yaml")) in PAGE.read_text().splitlines()


def test_estimates_follow_the_pages_formulas() -> None:
    facts = Cost("x/y", trained=10**9, frozen=10**9, tokens=256, flops=10**12, images=10**9)
    assert facts.memory == pytest.approx(24.0)
    assert facts.gpu_hours == pytest.approx(1e21 / (0.4 * 989.4e12) / 3600)
    assert facts._replace(flops=None).gpu_hours is None and "| ~1,000 |" in row(
        facts._replace(counted=False)
    )


def test_the_rows_of_other_configs_stay_as_they_are() -> None:
    page = PAGE.read_text()
    rows = kept(page)
    assert len(rows) > 60 and with_rows(page, rows) == page
    name = "imagenet256/rar_b"
    changed = with_rows(page, {**rows, name: f"| {name} | 1 |"})
    assert kept(changed) == {**rows, name: f"| {name} | 1 |"}

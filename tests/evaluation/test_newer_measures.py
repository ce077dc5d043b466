"""Closed forms of distances, kernels, slices and neighbours, and their names in records."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessellar.cli.evaluate import main
from tessellar.errors import UserError
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.metrics import ratios
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.protocols import protocol
from tessellar.evaluation.references import reference_from
from tessellar.evaluation.sources import ArrayImages
from tessellar.measures.density_coverage import density_coverage, expected_coverage
from tessellar.measures.frechet import (
    distance_at_infinity,
    frechet_distance,
    intercept,
    mean_ratio,
    subset_sizes,
)
from tessellar.measures.gaussian_mmd import cmmd, gaussian_mmd
from tessellar.measures.kid import unbiased_mmd
from tessellar.measures.mind import mind
from tessellar.measures.precision_recall import precision_recall
from tessellar.measures.statistics import FeatureStatistics, Moments
from tessellar.networks.standard import FDR6, FDR6_VALIDATION


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def moments_of(features: Tensor) -> Moments:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.moments()


def test_distance_of_two_gaussians() -> None:
    a = Moments(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 4.0])).double())
    b = Moments(torch.tensor([3.0, 4.0]).double(), torch.diag(torch.tensor([9.0, 1.0])).double())
    assert frechet_distance(a, b) == pytest.approx(30)
    one, other = moments_of(column(0, 2)), moments_of(column(1, 5))
    assert frechet_distance(one, other) == pytest.approx(6)
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    turned = [Moments(turn @ m.mean, turn @ m.cov @ turn.T) for m in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(30)


def test_fdr6_is_1_for_the_validation_images_and_6_7_for_var_d30() -> None:
    assert mean_ratio(FDR6_VALIDATION, FDR6_VALIDATION) == 1
    rows = {
        6.69: (1.97, 96.57, 75.35, 0.29, 7.19, 74.61),  # VAR-d30
        3.57: (1.01, 44.55, 46.68, 0.18, 3.99, 33.52),  # BAR-L
        4.31: (1.15, 52.76, 58.61, 0.22, 5.02, 38.00),  # BAR-B
    }
    for expected, row in rows.items():
        distances: dict[str, float] = dict(zip(FDR6, row, strict=True))
        assert mean_ratio(distances, FDR6_VALIDATION) == pytest.approx(expected, abs=0.05)
        values = ratios(distances, None, protocol("fdr6"))
        assert values["FDr^6"] == mean_ratio(distances, FDR6_VALIDATION)
        assert values["FDr(mae)"] == row[3] / 0.04284
    with pytest.raises(UserError, match="a: the validation images have distance 0"):
        mean_ratio({"a": 1.0}, {"a": 0.0})


def test_distance_of_infinitely_many() -> None:
    sizes = subset_sizes(50_000)
    assert (sizes[0], sizes[-1], len(sizes)) == (5000, 50_000, 15)
    assert intercept(sizes, [3 + 2000 / n for n in sizes]) == pytest.approx(3)
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(400, 8, generator=draw)
    truth = Moments(torch.zeros(8).double(), torch.eye(8).double())
    plain = frechet_distance(moments_of(features), truth)
    assert abs(distance_at_infinity(features, truth)) < plain / 2
    assert distance_at_infinity(features, truth) == distance_at_infinity(features, truth)


def test_kernel_distances() -> None:
    assert float(unbiased_mmd(column(0, 1), column(1, 2))) == pytest.approx(9.5)
    assert gaussian_mmd(column(0), column(1)) == pytest.approx(9.97504, abs=1e-5)
    axes = torch.eye(2)
    assert cmmd(axes[:1], axes[1:]) == pytest.approx(19.9003, abs=1e-4)
    assert cmmd(7 * axes[:1], 0.1 * axes[:1]) == pytest.approx(0, abs=1e-9)


def test_cmmd_of_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 30, 5)
    whole = cmmd(x, y)
    monkeypatch.setattr("tessellar.measures.precision_recall.BLOCK_ELEMENTS", 70)
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-12)


def test_mind() -> None:
    assert mind(column(0, 1), column(0, 2)) == pytest.approx(1.5)
    x = torch.randn(50, 16)
    shift = 2 * torch.nn.functional.normalize(torch.randn(16), dim=0)
    assert mind(x, x) == 0
    # The larger set gives a random part, so that equal sets are compared row by row.
    assert mind(x, x + shift) == pytest.approx(12, rel=0.1)
    assert mind(x, torch.cat([x, x + shift])) > 0
    assert mind(x, x + shift, seed=1) != mind(x, x + shift)


def test_neighbours() -> None:
    real, fake = column(0, 1, 3), column(0.5, 10)
    both = precision_recall(fake, real, k=1)
    assert (both.precision, both.recall) == (0.5, 1)
    found = density_coverage(fake, real, k=1)
    assert found.density == pytest.approx(1) and found.coverage == pytest.approx(2 / 3)
    far = density_coverage(torch.cat([fake, column(500, 900)]), real, k=1)
    assert far.coverage == found.coverage and far.density < found.density
    touching = density_coverage(column(2), column(0, 1, 9), k=1)  # on the ball's rim: not inside
    assert touching == (1, 1 / 3)  # only the ball of 9, which reaches to 1


def test_density_and_coverage_of_one_distribution() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = torch.randn(20, 2, 200, 4, generator=draw)
    found = [density_coverage(pair[0], pair[1]) for pair in pairs]
    density = sum(one.density for one in found) / 20
    coverage = sum(one.coverage for one in found) / 20
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(expected_coverage(200, 200), abs=0.01)
    assert expected_coverage(10_000, 10_000) == pytest.approx(1 - 2**-5, abs=1e-3)
    with pytest.raises(UserError, match="more than 5 reference images"):
        density_coverage(torch.randn(9, 2), torch.randn(5, 2))


def test_records_name_them_and_older_fingerprints_stay(
    tiny: Extractor, random_images: Callable[..., Tensor], write_npz: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    samples = ArrayImages(write_npz(random_images(20, seed=1), tmp_path / "s.npz"))
    reference = reference_from(ArrayImages(write_npz(random_images(30), tmp_path / "r.npz")), tiny)
    metrics = ("fd", "mind", "cmmd", "dc", "fdinf")
    record = evaluate_samples(samples, tiny, reference, metrics=metrics)
    names = ["FD(tiny)", "MIND(tiny)", "CMMD(tiny)", "density(tiny)", "coverage(tiny)"]
    assert list(record["metrics"]) == [*names, "FD-infinity(tiny)"]
    versions = record["comparable"]["metric_versions"]
    assert set(versions) == {"fd", "sfd", "is", "kid", "pr", "accuracy", "paired", "lpips"}
    assert "networks" not in record["comparable"]["protocol"]


def test_a_ratio_to_the_validation_images_carries_its_networks(
    tiny_file: Path, random_images: Callable[..., Tensor], write_npz: Callable[..., Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, seed in (("s", 1), ("train", 2), ("val", 3)):
        write_npz(random_images(30, seed=seed), tmp_path / f"{name}.npz")
    words = ["--extractor", str(tiny_file), "--reference", "train.npz", "--metrics", "fdr"]
    main(["samples", "s.npz", *words, "--validation", "val.npz", "--out", "a.json"])
    main(["samples", "val.npz", *words, "--validation", "val.npz", "--out", "b.json"])
    a, b = (json.loads(Path(f"{name}.json").read_text())["metrics"] for name in "ab")
    assert list(a) == ["FD(tiny)", "FDr(tiny)"]
    assert b["FDr(tiny)"] == 1 and a["FDr(tiny)"] == pytest.approx(a["FD(tiny)"] / b["FD(tiny)"])
    with pytest.raises(UserError, match="fdr.*--validation val.*--protocol fdr6"):
        main(["samples", "s.npz", *words])
    with pytest.raises(UserError, match="needs networks: clip-256, .*; given is tiny"):
        main(["samples", "s.npz", "--protocol", "fdr6", "--extractor", str(tiny_file)])

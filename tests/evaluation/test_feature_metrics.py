"""KID, precision and recall, Inception Score: equal to torch-fidelity's on the same features, and right alone."""

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from tessellar.errors import UserError
from tessellar.measures import precision_recall as blocks
from tessellar.measures.inception_score import ScoreSums, split_of
from tessellar.measures.kid import kernel_distance
from tessellar.measures.precision_recall import precision_recall

SAMPLES = 0.8 * torch.randn(130, 16, generator=torch.Generator().manual_seed(1)) + 0.2
REFERENCE = torch.randn(111, 16, generator=torch.Generator().manual_seed(2))


def test_kid_equals_torch_fidelity() -> None:
    theirs = kid_features_to_metric(SAMPLES, REFERENCE, kid_subset_size=60, verbose=False)
    ours = kernel_distance(SAMPLES, REFERENCE, subset_size=60)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)


def test_kid_is_unbiased() -> None:
    """The mean over many pairs of sets from one distribution is 0, that of the plain estimate is not."""
    draw = torch.Generator().manual_seed(0)
    values = [
        kernel_distance(*torch.randn(2, 20, 4, generator=draw), subsets=1).mean for _ in range(300)
    ]
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 300**0.5
    assert abs(mean) < 3 * error


def test_kid_of_one_image_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        kernel_distance(SAMPLES[:1], REFERENCE)


def test_precision_and_recall_equal_torch_fidelity() -> None:
    theirs = prc_features_to_metric(SAMPLES, REFERENCE, verbose=False)
    ours = precision_recall(SAMPLES, REFERENCE)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6) and 0 < ours.precision < 1
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6) and 0 < ours.recall < 1


def test_blocks_do_not_change_precision_and_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = precision_recall(SAMPLES, REFERENCE)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 7 * len(REFERENCE))
    assert precision_recall(SAMPLES, REFERENCE) == whole


def test_a_model_that_memorises_few_images_has_precision_without_recall() -> None:
    copies = REFERENCE[:10].repeat(10, 1) + 1e-3 * torch.randn(100, 16)
    result = precision_recall(copies, REFERENCE)
    assert result.precision == 1 and result.recall <= 0.1


def test_precision_of_too_few_images_is_refused() -> None:
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(SAMPLES[:3], REFERENCE)


def test_inception_score_equals_torch_fidelity_in_any_order() -> None:
    theirs = isc_features_to_metric(SAMPLES)
    sums = ScoreSums.empty(len(SAMPLES), 16, "10-shuffled")
    for index in torch.randperm(len(SAMPLES)).split(33):
        sums.update(SAMPLES[index], index)
    ours = sums.compute()
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-7)


def test_blocks_of_5000_are_cut_in_order() -> None:
    assert split_of(12_000, "blocks-of-5000").bincount().tolist() == [5000, 5000, 2000]
    assert split_of(7, "10-shuffled").bincount().tolist() == [1] * 7


def test_inception_score_of_certain_and_of_useless_predictions() -> None:
    certain, flat = (ScoreSums.empty(40, 4, "blocks-of-5000") for _ in range(2))
    certain.update(1000.0 * torch.eye(4).repeat(10, 1), torch.arange(40))
    flat.update(torch.zeros(40, 4), torch.arange(40))
    assert certain.compute().mean == pytest.approx(4) and flat.compute().mean == pytest.approx(1)


def test_a_split_without_images_is_refused() -> None:
    sums = ScoreSums.empty(20, 3, "10-shuffled")
    sums.update(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="each of its 10 splits"):
        sums.compute()

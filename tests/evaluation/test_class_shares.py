"""Classes that are unevenly frequent: samples as the data has them, and a warning where they differ."""

import torch
from torch import Tensor

from tessellar.evaluation.class_match import other_shares
from tessellar.evaluation.sources import ImageSource, counts_of
from tessellar.sampling.run import balanced_labels, proportional_labels


class Labels(ImageSource):
    name = "labels"

    def __init__(self, labels: Tensor, names: tuple[str, ...]) -> None:
        self.class_counts = counts_of(labels)
        self.class_names = names

    def batches(self, batch_size: int):
        return iter(())

    def fingerprint(self) -> str:
        return ""


NAMES = ("a", "b", "c")
UNEVEN = [95, 14, 1]


def test_labels_come_in_the_proportions_of_the_data() -> None:
    labels = proportional_labels(220, UNEVEN)
    assert torch.tensor(labels).bincount().tolist() == [190, 28, 2]
    for start in (10, 55, 110):  # any prefix too, up to one
        counts = torch.tensor(labels[:start]).bincount(minlength=3)
        assert (counts - torch.tensor(UNEVEN) * start / 110).abs().max() <= 1


def test_balanced_samples_of_an_uneven_set_are_warned_of() -> None:
    balanced = Labels(torch.tensor(balanced_labels(60, 3)), NAMES)
    (line,) = other_shares(balanced, NAMES, UNEVEN)
    assert "'a' 33.3 % and 86.4 %" in line and "--labels data" in line
    assert other_shares(balanced, (), UNEVEN)  # by number where names are not known
    even = Labels(torch.tensor(proportional_labels(60, UNEVEN)), NAMES)
    assert other_shares(even, NAMES, UNEVEN) == []
    assert other_shares(balanced, NAMES, [20, 21, 19]) == []
    assert other_shares(balanced, (), ()) == []
    renamed = Labels(torch.tensor(proportional_labels(60, UNEVEN)), ("c", "b", "a"))
    assert other_shares(renamed, NAMES, UNEVEN)

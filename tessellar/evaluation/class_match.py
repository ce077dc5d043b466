"""Labels of images and classes of a classifier meet by name; where one side has no names, what is
assumed is said.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessellar.data.classes import are_numbers, shown
from tessellar.errors import UserError
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.sources import ImageSource


class ClassMatch(NamedTuple):
    """`ids[label]` is the network's class, int64 [C]; None where nobody asks."""

    ids: Tensor | None = None
    warnings: tuple[str, ...] = ()


def classes_of(labels: Tensor, ids: Tensor) -> Tensor:
    """The network's classes of int64 `labels` [B]; raises UserError for a label that has none."""
    wrong = labels[(labels < 0) | (labels >= len(ids))]
    if len(wrong):
        raise UserError(
            f"images have class {int(wrong[0])}; there are the classes 0 to {len(ids) - 1}"
        )
    return ids[labels]


def match_classes(source: ImageSource, extractor: Extractor) -> ClassMatch:
    """Which of the network's classes each label of `source` is: by name, or by number where one
    side has no names.

    Raises UserError for a class of `source` that the network does not know.
    """
    ours = source.class_names
    theirs = extractor.class_names
    if not ours:
        return match_bare_labels(source, extractor)
    if ours == theirs:
        return ClassMatch(torch.arange(len(ours)))
    if not theirs:
        return match_nameless_network(source, extractor)
    if len(set(theirs)) < len(theirs):
        raise UserError(
            f"{extractor.name} has several classes of one name: those of {source.name} cannot be found"
        )
    missing = _without(ours, theirs)
    if not missing:
        return ClassMatch(torch.tensor(list(map(theirs.index, ours))))
    any_number = any(are_numbers([name]) for name in theirs)
    numbers = _numbers_in_range(ours, extractor)
    if numbers and not any_number:
        said = f"the classes of {source.name} are named by numbers, taken as those of {extractor.name} ({_few(theirs)})"
        return ClassMatch(torch.tensor(numbers), (said,))
    raise UserError(
        f"{shown(missing)} of {source.name} is no class of {extractor.name}, which knows {shown(theirs, 10)}: rename "
        "the classes, or measure without accuracy"
    )


def match_bare_labels(source: ImageSource, extractor: Extractor) -> ClassMatch:
    ids = torch.arange(extractor.num_classes)
    names = extractor.class_names
    if not names or names == tuple(map(str, ids.tolist())):
        return ClassMatch(ids)
    said = (
        f"labels of {source.name} are numbers, taken as those of {extractor.name} ({_few(names)})"
    )
    return ClassMatch(ids, (said,))


def match_nameless_network(source: ImageSource, extractor: Extractor) -> ClassMatch:
    ours = source.class_names
    unknown = f"{extractor.name} does not say the names of its classes"
    numbers = _numbers_in_range(ours, extractor)
    if numbers:
        said = (
            f"{unknown}: {ours[-1]!r} of {source.name} is taken as its class {ours[-1]}, and so on"
        )
        if list(ours) != sorted(ours):
            said += "; one trained on folders in the order of text is to be trained again"
        return ClassMatch(torch.tensor(numbers), (said,))
    if len(ours) != extractor.num_classes:
        raise UserError(
            f"{unknown}, of which there are {extractor.num_classes}, and {source.name} has {len(ours)}: train it again "
            "with evaluate.py extractor, or name them with --network.class_names"
        )
    said = f"{unknown}: {ours[0]!r} of {source.name} is taken as its class 0, and so on"
    return ClassMatch(torch.arange(len(ours)), (said,))


def other_classes(source: ImageSource, name: str, class_names: Sequence[str]) -> list[str]:
    """A warning where two sets of several named classes, `source` and the one called `name`, do not
    have the same.
    """
    ours = source.class_names
    theirs = tuple(class_names)
    if min(len(ours), len(theirs)) < 2 or are_numbers(ours) != are_numbers(theirs):
        return []
    only_ours = _without(ours, theirs)
    only_theirs = _without(theirs, ours)
    differences = []
    if only_ours:
        differences.append(f"{shown(only_ours)} only in {source.name}")
    if only_theirs:
        differences.append(f"{shown(only_theirs)} only in {name}")
    if not differences:
        return []
    return [f"samples and reference differ in their classes: {'; '.join(differences)}"]


def other_shares(
    source: ImageSource, class_names: Sequence[str], class_counts: Sequence[int]
) -> list[str]:
    """A warning where classes have other shares of the samples than of a reference, whose classes
    have these names and numbers of images: that is measured too.
    """
    ours = _shares(source.class_names, source.class_counts)
    theirs = _shares(class_names, class_counts)
    named = bool(source.class_names and class_names)
    if min(len(ours), len(theirs)) < 2 or (not named and len(ours) != len(theirs)):
        return []
    if other_classes(source, "reference", class_names):
        return []  # which says it already
    if not named:  # then by number
        ours = dict(enumerate(ours.values()))
        theirs = dict(enumerate(theirs.values()))
    gaps = {one: ours.get(one, 0.0) - theirs.get(one, 0.0) for one in [*ours, *theirs]}
    distance = sum(map(abs, gaps.values())) / 2
    fewest = min(sum(source.class_counts), sum(class_counts))
    # What independent draws of as many images may differ by, and five in a hundred.
    if distance <= 0.05 + 0.8 * sqrt(len(gaps) / fewest):
        return []
    worst = max(gaps, key=lambda one: abs(gaps[one]))
    return [
        f"classes have other shares of the samples than of the reference, which is measured too: {worst!r} "
        f"{100 * ours.get(worst, 0.0):.1f} % and {100 * theirs.get(worst, 0.0):.1f} % "
        "(evaluate.py model --labels data draws them as the data has them)"
    ]


def _shares(names: Sequence[str], counts: Sequence[int]) -> dict[Any, float]:
    """Share of each class by its name, or by its number where there is none."""
    total = max(sum(counts), 1)
    keys = names if len(names) >= len(counts) else range(len(counts))
    return {key: count / total for key, count in zip(keys, counts, strict=False)}


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those of the names that are not among the others."""
    known = set(others)
    return [name for name in names if name not in known]


def _numbers_in_range(names: Sequence[str], extractor: Extractor) -> list[int]:
    """The names as numbers of the network's classes; empty where one is none."""
    if not are_numbers(names):
        return []
    numbers = list(map(int, names))
    return numbers if 0 <= min(numbers) and max(numbers) < extractor.num_classes else []


def _few(names: Sequence[str]) -> str:
    return ", ".join(f"{i} is {name!r}" for i, name in enumerate(names[:3]))

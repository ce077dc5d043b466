"""Schedules of a search: how many entities of a sequence stand after each of its steps.

Lengths count entities: tokens of an ordered sequence or of a grid, scales, levels, windows. All end at the
sequence's end; a step that would add nothing ends the search. With given entities a schedule is shifted by
their number (arXiv 2604.15453, official code), and clipped again, which the official code does not do.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counting
from itertools import islice

from tessellar.errors import UserError
from tessellar.protocol.ranges import check_list, check_number, check_whole


@dataclass(frozen=True)
class SearchSchedule(ABC):
    """Lengths of the sequences after each step; `steps` limits their number (None: up to the end)."""

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_whole("steps of the search", self.steps, least=1)

    @abstractmethod
    def planned(self) -> Iterator[int]:
        """Lengths without an end, from an empty sequence on; they grow."""

    def lengths(self, count: int, given: int = 0) -> tuple[int, ...]:
        """Lengths after each step for sequences of `count` entities, the first `given` of which stand
        already.
        """
        found: list[int] = []
        for length in islice(self.planned(), self.steps):
            clipped = min(length + given, count)
            if clipped > (found[-1] if found else given):
                found.append(clipped)
            if clipped == count:
                break
        if not found:
            raise UserError(f"all {count} entities are given: there is nothing to search")
        return tuple(found)


@dataclass(frozen=True)
class Geometric(SearchSchedule):
    """1, base, base^2, ...: the lengths that ordered tokenizers are trained at."""

    base: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("base of the schedule", self.base, above=1)

    def planned(self) -> Iterator[int]:
        return (int(self.base**step) for step in counting())


@dataclass(frozen=True)
class Even(SearchSchedule):
    """`every`, 2 every, 3 every, ...: grids and scales (official name: linear)."""

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("every of the schedule", self.every, least=1)

    def planned(self) -> Iterator[int]:
        return counting(self.every, self.every)


@dataclass(frozen=True)
class Listed(SearchSchedule):
    """The given lengths, which grow."""

    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", check_list("at of the schedule", self.at))
        before = 0
        for length in self.at:
            check_whole("at of the schedule", length, least=before + 1)
            before = length
        if not self.at:
            raise UserError("a Listed schedule needs lengths: at [1, 4, 16]")

    def planned(self) -> Iterator[int]:
        return iter(self.at)

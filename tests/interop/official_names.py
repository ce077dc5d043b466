"""Recorded weights that remember their official names: which parameter of ours comes from which of theirs.

The replays import the recorded weights through the importers; here those weights carry their names along.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor, nn

from tessellar.parity.recording import WeightFiles, read_recording
from tessellar.parity.registration import replays_of

GOLDEN = Path(__file__).parents[1] / "golden"


class Named(Tensor):
    """A tensor that carries the official names that its values come from through every operation."""

    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tensor: Tensor, names: frozenset[str]) -> "Named":
        made = tensor.as_subclass(cls)
        made.names = names
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = frozenset().union(
            *(value.names for value in _flat((args, kwargs or {})) if isinstance(value, Named))
        )
        result = super().__torch_function__(func, types, args, kwargs or {})
        for value in _flat(result):
            if isinstance(value, Named):
                value.names = names
        return result


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


class NamedWeights(WeightFiles):
    """The weight files of a recording, each tensor with its file and name."""

    def __getitem__(self, part: str) -> dict[str, Tensor]:
        file = self.files[part]
        return {
            name: Named.of(t, frozenset({f"{file}/{name}"}))
            for name, t in super().__getitem__(part).items()
        }


class Imported(NamedTuple):
    """A module that weights were put into, and the official names behind each of its parameters."""

    module: nn.Module
    names: dict[str, frozenset[str]]

    @property
    def all_names(self) -> set[str]:
        return {name for sources in self.names.values() for name in sources}


class Enough(Exception):
    """What was looked for is imported: the replay need not go on."""


def import_until(system: str, enough: Callable[[list[Imported]], bool]) -> list[Imported]:
    """The modules that the replays of a system fill with recorded weights, until they are `enough`."""
    recording = read_recording(GOLDEN / system)
    weights = recording.weights
    recording.weights = NamedWeights(weights.folder, weights.files, weights.storage)
    found: list[Imported] = []
    load = nn.Module.load_state_dict

    def watch(module: nn.Module, state: Any, *rest: Any, **options: Any) -> None:
        own = dict(module.named_parameters())
        load(module, {key: t.as_subclass(Tensor) for key, t in state.items()}, *rest, **options)
        names = {k: t.names for k, t in state.items() if k in own and isinstance(t, Named)}
        if names:
            found.append(Imported(module, names))
        if enough(found):
            raise Enough

    with pytest.MonkeyPatch.context() as patch, suppress(Enough):
        patch.setattr(nn.Module, "load_state_dict", watch)
        for replay in replays_of(recording.system):
            replay.function(recording)
    return found


@cache
def imported(system: str) -> list[Imported]:
    """Modules that hold every recorded parameter."""
    return import_until(
        system, lambda found: listed(system) <= {name for item in found for name in item.all_names}
    )


def listed(system: str) -> set[str]:
    """File and name of every parameter that a recipe lists."""
    lists = [part["decay"] for part in recipe(system).values() if part["decay"] is not None]
    return {
        f"{some['file']}/{name}"
        for some in lists
        for name, value in some["names"].items()
        if value is not None
    }


def recipe(system: str) -> dict[str, Any]:
    return json.loads((GOLDEN / system / "recipe.json").read_text())["parts"]

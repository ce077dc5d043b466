"""Every number of every system's config, set to what no file can hold: refused or harmless, in seconds and some GB."""

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tessellar.checkpoints.building import build_filled
from tessellar.errors import UserError
from tessellar.protocol.configured import build
from tests.hostile.attacks import watched
from tests.tiny.pairs import GENERATORS, TOKENIZERS, reason_against

SECONDS = 20  # of a machine that does other things as well
VALUES = (-1, 0, 3, 10**5, 10**7, 10**9, 10**12)
Place = tuple[str | int, ...]


@cache
def system(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state of a tiny tokenizer, or of a generator of the first tokenizer that it reads."""
    made: nn.Module
    if name in TOKENIZERS:
        made = TOKENIZERS[name]()
    else:
        fits = (t for t in TOKENIZERS if reason_against(t, name) is None)
        made = GENERATORS[name](TOKENIZERS[next(fits)]().layout)
    return made.config, made.state_dict()  # type: ignore[return-value]


def places(config: Any, above: Place = ()) -> Iterator[Place]:
    """Where numbers stand."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from places(value, (*above, key))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from places(value, (*above, index))
    elif isinstance(config, (int, float)):
        yield above


def changed(config: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    node: Any = config
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return config


@contextmanager
def in_time(where: str) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"{where} took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attack(name: str, place: Place, value: Any) -> None:
    config, state = system(name)
    where = f"{name}: {'.'.join(map(str, place))} of {value}"
    given = changed(config, place, value)
    with watched(gigabytes=4), in_time(where):
        try:
            build_filled(lambda: build(given, where=where), state, where, where)
        except UserError as error:
            assert "\n" not in str(error)


NAMES = [*TOKENIZERS, *GENERATORS]


@settings(max_examples=20)
@given(data=st.data())
def test_no_number_of_a_config_takes_time_or_memory(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    place = data.draw(st.sampled_from(list(places(system(name)[0]))))
    values = st.one_of(st.sampled_from(VALUES), st.integers(-(2**70), 2**70), st.floats())
    attack(name, place, data.draw(values))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_no_number_of_any_system_takes_time_or_memory(name: str) -> None:
    for place in places(system(name)[0]):
        for value in (*VALUES, float("nan"), float("inf"), None, "x", [], {}):
            attack(name, place, value)


def test_the_untouched_systems_are_built() -> None:
    for name in NAMES[::5]:
        config, state = system(name)
        build_filled(lambda config=config: build(config), state, name, name)

"""Facts of tiny systems, for the figures of papers: built, planned and asked for one prediction.

The instances are those of tests/tiny/pairs.py; each is paired as the paper's published samples are
(docs/recipes/sampling.yaml), or else with the first tokenizer that its layout allows.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import yaml

from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.layout import Layout
from tessellar.protocol.noise import Noise

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Tokens:
    """A tiny tokenizer: its name, package, image side and layout."""

    name: str
    module: str
    side: int
    layout: Layout


@dataclass(frozen=True)
class System:
    """A tiny generator over a tiny tokenizer's tokens.

    `entity[p]` is the number of the entity that token p belongs to, `sizes` are the entities'; `drawn` says that every
    image draws its own order, and `distribution` what one evaluation predicts.
    """

    name: str
    module: str
    tokens: Tokens
    entity: tuple[int, ...]
    sizes: tuple[int, ...]
    drawn: bool
    distribution: Distribution

    @property
    def head(self) -> str:
        """The name of the distribution's class."""
        return type(self.distribution).__name__


@cache
def pairs() -> ModuleType:
    """tests/tiny/pairs.py by its file: another package is called `tests`, too."""
    spec = importlib.util.spec_from_file_location("pairs", ROOT / "tests" / "tiny" / "pairs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tokens_of(name: str) -> Tokens:
    with torch.device("meta"):
        made = pairs().TOKENIZERS[name]()
    return Tokens(name, _package(made), made.image_size[0], made.layout)


@cache
def published_pairs() -> dict[str, str]:
    """The tokenizer of a generator's published samples, both by their names in pairs.py."""
    files = yaml.safe_load((ROOT / "docs" / "recipes" / "sampling.yaml").read_text())
    return {entry["pair"][1]: entry["pair"][0] for entry in reversed(files.values())}


def partner(generator: str) -> str:
    """The tokenizer that a tiny generator is shown with."""
    names = [published_pairs()[generator]] if generator in published_pairs() else []
    names += list(pairs().TOKENIZERS)
    return next(name for name in names if pairs().reason_against(name, generator) is None)


@cache
def system_of(generator: str) -> System:
    """Builds a pair on the CPU, from seed 0, and asks for its first entity."""
    name = partner(generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = pairs().TOKENIZERS[name]()
        made = pairs().GENERATORS[generator](tokenizer.layout)
    made.bind(tokenizer)
    made.eval()
    entities = made.plan(Noise([0]))
    drawn = not torch.equal(entities.order, made.plan(Noise([1])).order)
    with torch.no_grad():
        state = made.start(Condition(ids=torch.tensor([1])), entities=entities)
        distribution = made.predict(state, made.layout.blank(1), 1)
    ranks = entities.inverse.reshape(-1)
    return System(
        generator,
        _package(made),
        Tokens(name, tokens_of(name).module, tokenizer.image_size[0], made.layout),
        tuple(entities.entity_at(ranks).tolist()),
        entities.sizes,
        drawn,
        distribution,
    )


def of_package(module: str) -> list[System | Tokens]:
    """What there is to draw of a package: its tiny tokenizers, or its tiny systems."""
    found: list[System | Tokens] = []
    for name in pairs().TOKENIZERS:
        if tokens_of(name).module == module:
            found.append(tokens_of(name))
    for name in pairs().GENERATORS:
        if _package_of_generator(name) == module:
            found.append(system_of(name))
    return found


@cache
def _package_of_generator(name: str) -> str:
    with torch.device("meta"):
        layout = pairs().TOKENIZERS[partner(name)]().layout
        return _package(pairs().GENERATORS[name](layout))


def _package(made: object) -> str:
    """The package of a paper in which an object's class lies."""
    return ".".join(type(made).__module__.split(".")[:3])

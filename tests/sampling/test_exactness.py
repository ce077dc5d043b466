"""Exact algorithms give the law of ancestral sampling: chi-square tests of 100,000 whole images against the truth.

The generator is a table, so the probability of every image is known. Each test alarms falsely with probability 1e-6
(conftest.py). That they can fail is shown by rules that are known to be wrong.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import ordered
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Linear
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import GroupedRatio
from tessellar.sampling.couplings import COUPLINGS, Judged, Reuse, maximal
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.draft_model import draft_model
from tessellar.sampling.drafts import SCHEMES
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import Rules, speculative_jacobi

SAMPLES = 100_000
LAYOUT = sequence_layout(5, Categorical(3))
PROCESSING = (
    (Choice(temperature=1.3, top_p=0.9), Guidance(Constant(1.8))),
    (Choice(temperature=0.8, top_k=2), Guidance(Linear(2.5))),
)
PLAIN = (Choice(), NO_GUIDANCE)
Sampler = Callable[[TableGenerator, Condition, Choice, Noise, Guidance], Tensor]


def jacobi(rules: Rules) -> Sampler:
    return lambda generator, condition, choice, noise, guidance: speculative_jacobi(
        generator, condition, choice, noise, guidance, rules
    )


def drafted(
    generator: TableGenerator,
    condition: Condition,
    choice: Choice,
    noise: Noise,
    guidance: Guidance,
) -> Tensor:
    other = TableGenerator(generator.layout, seed=7, spread=0.7)
    own = Guidance(Constant(1.2)) if guidance.branches == 2 else None
    return draft_model(generator, other, condition, choice, noise, guidance, own, drafts=2)


ALGORITHMS: dict[str, Sampler] = {
    "draft model": drafted,
    **{
        f"sjd, coupling {name}": jacobi(Rules(4, coupling=coupling))
        for name, coupling in COUPLINGS.items()
    },
}


@pytest.fixture
def exact(shared_noise, fits, histogram) -> Callable[..., bool]:
    """Whether images of `labels` (in turn) follow their laws, each label at the false-alarm rate."""

    def test(
        sampler: Sampler,
        generator: TableGenerator,
        labels: tuple[int, ...] = (1,),
        choice: Choice = PLAIN[0],
        guidance: Guidance = PLAIN[1],
        seed: int = 0,
    ) -> bool:
        batch = SAMPLES // len(labels) * len(labels)
        condition = Condition(ids=torch.tensor(labels).repeat(batch // len(labels)))
        tokens = sampler(generator, condition, choice, shared_noise(seed, batch), guidance)
        laws = generator.joint(Condition(ids=torch.tensor(labels)), choice, guidance)
        return all(
            fits(histogram(generator, tokens[row :: len(labels)]), law)
            for row, law in enumerate(laws)
        )

    return test


@pytest.mark.parametrize(
    ("labels", "choice", "guidance"),
    [((1,), *PROCESSING[0]), ((0, 1, 2), *PROCESSING[0]), ((0, 1, 2), *PROCESSING[1])],
    ids=["batch 1, top-p", "batch 3, top-p", "batch 3, top-k"],
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_law_of_ancestral_sampling(
    name: str, labels: tuple[int, ...], choice: Choice, guidance: Guidance, exact
) -> None:
    """Rows advance apart; that a batch of three gives each image as it is alone is tested in test_speculative.py."""
    assert exact(ALGORITHMS[name], TableGenerator(LAYOUT), labels, choice, guidance)


@pytest.mark.parametrize("init", SCHEMES)
def test_every_initial_draft(init: str, exact) -> None:
    """On a grid, so that the neighbours above and to the left differ; windows wider than what is left."""
    generator = TableGenerator(grid_layout(2, 3, Categorical(2)))
    assert exact(jacobi(Rules(5, init, coupling=maximal)), generator, seed=1)


@pytest.mark.parametrize("init", ["repeat-left", "sample-left"])
def test_segments_and_an_order_that_is_not_the_rasters(init: str, exact) -> None:
    layout = Layout(
        (Segment((2,), Categorical(2), "holistic"), Segment((2, 2), Categorical(2), "grid"))
    )
    generator = TableGenerator(layout)
    generator.entities = ordered([5, 0, 2, 1, 4, 3], (1,) * 6)
    assert exact(jacobi(Rules(4, init)), generator, seed=2)


def test_siblings(exact) -> None:
    rules = Rules(4, "uniform", coupling=maximal, siblings=3)
    assert exact(jacobi(rules), TableGenerator(LAYOUT), (1,), *PROCESSING[0], seed=7)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_entities_of_several_tokens(coupling: str, exact) -> None:
    generator = TableGenerator(sequence_layout(6, Categorical(2)), entity_size=2)
    assert exact(jacobi(Rules(3, coupling=COUPLINGS[coupling])), generator, seed=3)


def test_ancestral_sampling(exact) -> None:
    def plain(
        generator: TableGenerator,
        condition: Condition,
        choice: Choice,
        noise: Noise,
        guidance: Guidance,
    ) -> Tensor:
        return Ancestral()(generator, condition, Sampling(choice=choice), noise, guidance)

    assert exact(plain, TableGenerator(LAYOUT), (0, 1, 2), *PROCESSING[0])


@pytest.mark.parametrize("window", [1, 2, 9])
def test_windows(window: int, exact) -> None:
    assert exact(jacobi(Rules(window, "uniform", coupling=maximal)), TableGenerator(LAYOUT), seed=4)


def stale(window: Judged) -> tuple[Tensor, Tensor]:
    """Wrong: drafts that stay behind a rejection keep their old law (SCD's released loop)."""
    tokens, law = maximal(window)
    return tokens, torch.where(window.kept[..., None], window.q, law)


def test_a_stale_law_is_found_out(exact) -> None:
    generator = TableGenerator(sequence_layout(7, Categorical(2)))
    assert exact(jacobi(Rules(4, coupling=maximal)), generator, seed=5)
    assert not exact(jacobi(Rules(4, coupling=stale)), generator, seed=5)


@pytest.mark.parametrize(
    "rules",
    [Rules(4, acceptance=GroupedRatio(2, 1.0)), Rules(4, coupling=Reuse(0.5))],
    ids=["gsd", "sjd++"],
)
def test_approximate_rules_are_found_out(rules: Rules, exact) -> None:
    assert not exact(jacobi(rules), TableGenerator(sequence_layout(7, Categorical(2))), seed=6)

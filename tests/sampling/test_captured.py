"""Steps that are compiled whole: traced for real (`fullgraph=True`), with the tokens of the plain loop."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.guidance import Constant, Linear
from tessellar.sampling import captured
from tessellar.sampling.captured import reach
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tests.models.test_fixed_state import FIXED, UNEQUAL
from tests.models.test_protocol import labels, make

GREEDY = Sampling(guidance=Constant(2.0), choice=Choice(temperature=0))
DRAWN = Sampling(guidance=Linear(3.0), choice=Choice(temperature=0.9, top_k=7, top_p=0.95))


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run as a graph; machines that run tests need no C++ compiler."""
    monkeypatch.setattr(captured, "BACKEND", "aot_eager")


def tokens_of(name: str, sampling: Sampling, compile: bool, recorder: Recorder | None = None):
    chosen = Sampling(
        guidance=sampling.guidance,
        choice=sampling.choice,
        algorithm=Ancestral(compile=compile),
    )
    return chosen.tokens(make(name), labels(2), [5, 6], recorder)


QUICK = ("rar",)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FIXED]


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_those_of_the_plain_loop(name: str) -> None:
    torch._dynamo.reset()
    sampling = GREEDY if name in FIXED[::2] else DRAWN
    expected = tokens_of(name, sampling, compile=False)
    assert torch.equal(tokens_of(name, sampling, compile=True), expected)


@pytest.mark.long
def test_a_step_attends_to_what_is_there_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several graphs one after the other, each for the steps that fit into it."""
    torch._dynamo.reset()
    generator = make("llamagen")
    count = generator.entities.count
    monkeypatch.setattr(captured, "SHORTEST", -(-count // 2))
    recorder = Recorder()
    expected = tokens_of("llamagen", DRAWN, compile=False)
    assert torch.equal(tokens_of("llamagen", DRAWN, compile=True, recorder=recorder), expected)
    assert recorder.report().evaluations_per_image == count
    lengths = reach(generator.start(labels(1)), count)
    assert len(lengths) == count and len(set(lengths)) == 2
    for length, end in zip(lengths, range(1, count + 1), strict=True):
        assert end <= length < max(2 * end, captured.SHORTEST + 1)


@pytest.mark.parametrize("name", UNEQUAL[:2])
def test_steps_of_unequal_shapes_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match="give steps of unequal shapes"):
        tokens_of(name, GREEDY, compile=True)


def test_entropies_are_refused() -> None:
    with pytest.raises(UserError, match="gives no entropies"):
        tokens_of("llamagen", GREEDY, compile=True, recorder=Recorder(entropy=True))

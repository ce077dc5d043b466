"""Several rows of a grid generated at once: exact limits, counts, fronts, and what their tokens see."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.maskgit import MaskGIT as MaskGITModel
from tessellar.models.rar import RAR
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import Constant, Linear
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.parallel_jacobi import ParallelJacobi, fronts_of
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tessellar.sampling.zipar import ZipAR

GRID = grid_layout(4, 6, Categorical(11))
LABELS = Condition(ids=torch.tensor([0, 3, 2]))
COLD = Choice(0.4)
GUIDED = Linear(2.0)


def shaken(generator: Generator, size: float = 0.2) -> Generator:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=draw))
    return generator.eval()


def llamagen() -> Generator:
    return shaken(LlamaGen(GRID, 32, 2, 4, num_classes=5, ffn_multiple_of=8))


MADE: dict[str, Callable[[], Generator]] = {
    "llamagen": llamagen,
    "rar": lambda: shaken(RAR(GRID, 32, 2, 4, 64, num_classes=5)),
    "table": lambda: TableGenerator(grid_layout(2, 3, Categorical(4)), num_classes=4),
}


def drawn(
    algorithm: Algorithm,
    generator: Generator,
    choice: Choice = COLD,
    recorder: Recorder | None = None,
) -> Tensor:
    sampling = Sampling(GUIDED, choice, algorithm)
    return sampling.tokens(generator, LABELS, [4, 5, 6], recorder)


@pytest.mark.parametrize("name", MADE)
def test_a_window_of_the_width_is_plain_decoding(name: str) -> None:
    generator = MADE[name]()
    columns = generator.layout.grid[1]  # type: ignore[index]
    for choice in (COLD, Choice(0)) if name == "table" else (COLD,):
        plain = drawn(Ancestral(), generator, choice)
        for window in (columns, columns + 3) if name == "table" else (columns,):
            assert torch.equal(drawn(ZipAR(window), generator, choice), plain)
        if name == "table" and choice is COLD:
            assert not torch.equal(drawn(ZipAR(1), generator, choice), plain)


@pytest.mark.parametrize(
    ("name", "init"),
    [("llamagen", "random"), ("rar", "uniform"), ("table", "random"), ("table", "uniform")],
)
def test_coverage_of_a_whole_row_is_speculative_jacobi_decoding(name: str, init: str) -> None:
    generator = MADE[name]()
    for window in (1, 4, 9) if name == "table" else (9,):
        for choice in (COLD, Choice(0)) if name == "table" else (COLD,):
            counted = [Recorder(entropy=True), Recorder(entropy=True)]
            plain = drawn(SpeculativeJacobi(window, init), generator, choice, counted[0])  # type: ignore[arg-type]
            found = drawn(ParallelJacobi(window, 1.0, init), generator, choice, counted[1])  # type: ignore[arg-type]
            assert torch.equal(found, plain), window
            reports = [recorder.report().as_dict() for recorder in counted]
            for fact in ("evaluations", "tried", "accepted", "committed", "begun", "gained"):
                assert reports[0][fact] == reports[1][fact], fact
            assert reports[0]["nats"] == pytest.approx(reports[1]["nats"], rel=1e-4)


@pytest.mark.parametrize(("rows", "columns", "window", "expected"), [
    (16, 16, 8, 136), (4, 6, 2, 12), (3, 5, 1, 7),
])  # fmt: skip
def test_evaluations_of_zipar(rows: int, columns: int, window: int, expected: int) -> None:
    """C + (R - 1) w, each committing the tokens of the begun rows."""
    generator = shaken(LlamaGen(grid_layout(rows, columns, Categorical(3)), 8, 1, 2, 5))
    recorder = Recorder()
    drawn(ZipAR(window), generator, recorder=recorder)
    report = recorder.report()
    assert report.evaluations == 3 * expected and report.passes == expected
    assert sum(n * times for n, times in enumerate(report.committed)) == 3 * rows * columns


class Seen(TableGenerator):
    """Keeps what every place was predicted from: the digits of its prefix."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(grid_layout(rows, columns, Categorical(2)), num_classes=1)
        self.windows: list[Tensor] = []
        self.fed: list[Tensor] = []

    def predict_places(
        self, state: State, tokens: Tensor, places: Tensor, groups: Tensor | None = None
    ) -> Logits:
        self.windows.append(places[0].clone())
        self.fed.append(tokens[0].clone())
        return super().predict_places(state, tokens, places, groups)


def test_the_latest_token_of_a_row_stands_in_for_its_last_one() -> None:
    """3 x 4, window 2: the row below begins when two tokens are there, and reads the last one again once it is."""
    generator = Seen(3, 4)
    result = ZipAR(2)(
        generator,
        Condition(ids=torch.tensor([0])),
        Sampling(),
        Noise([2]),
        Constant(1.0).guidance(),
    )[0]
    windows = [window.tolist() for window in generator.windows]
    assert windows == [[0], [1], [2, 4], [3, 5], [6, 8, 4], [7, 9], [10, 8], [11]]
    assert generator.fed[2][3] == result[1]  # (0, 1) in the place of (0, 3)
    assert generator.fed[4][3] == result[3] and generator.fed[4][7] == result[5]


@torch.no_grad()
def test_released_zipar_attends_to_places_that_nobody_read() -> None:
    generator = llamagen()
    many = torch.arange(40) % 5  # few places are missed, so few tokens differ
    ours, released = (
        Sampling(GUIDED, Choice(1.0), algorithm).tokens(
            generator, Condition(ids=many), list(range(40))
        )
        for algorithm in (ZipAR(2), ZipAR(2, exact_official=True))
    )
    assert not torch.equal(ours, released)
    # With a window of the width nothing before a token is missing.
    plain = drawn(Ancestral(), generator, Choice(1.0))
    assert torch.equal(drawn(ZipAR(6, exact_official=True), generator, Choice(1.0)), plain)


def test_windows_of_rows_follow_the_rows_above() -> None:
    """4 x 6, a row begins behind 2 tokens, windows of 3: no row overtakes; a single one runs on."""
    counts = torch.tensor([[0, 0, 0, 0], [4, 2, 2, 0], [6, 3, 0, 0], [6, 6, 6, 5], [6, 1, 0, 0]])
    fronts = fronts_of(counts, 6, window=3, enough=2)
    expected = [
        [(0, 3)],
        [(4, 2), (8, 2)],  # row 2 has as many as row 1; row 3 begins behind it
        [(9, 3), (12, 3)],
        [(23, 1)],
        [(7, 3)],
    ]
    expected[1].append((18, 2))
    for start, size, wanted in zip(fronts.start, fronts.size, expected, strict=True):
        found = [(a, b) for a, b in zip(start.tolist(), size.tolist(), strict=True) if b]
        assert found == wanted
    assert fronts_of(torch.tensor([[4, 0]]), 6, 9, 6).size.tolist() == [[8]]


@pytest.mark.parametrize(("name", "coverage"), [("llamagen", 0.2), ("table", 0.2), ("table", 0.5)])
def test_rows_at_once_need_fewer_evaluations_and_an_image_does_not_depend_on_its_batch(
    name: str, coverage: float
) -> None:
    generator = MADE[name]()
    tried = (
        ParallelJacobi(5, coverage),
        ParallelJacobi(3, coverage, "uniform"),
        ZipAR(2),
    )
    for algorithm in tried if name == "table" else tried[:1]:
        together = drawn(algorithm, generator)
        generator.layout.check(together)
        sampling = Sampling(GUIDED, COLD, algorithm)
        for i, seed in enumerate((4, 5, 6)):
            alone = sampling.tokens(generator, LABELS.select(torch.tensor([i])), [seed])
            assert torch.equal(alone[0], together[i])
    recorders = [Recorder(), Recorder()]
    drawn(ParallelJacobi(5, coverage), generator, Choice(0), recorders[0])
    drawn(SpeculativeJacobi(5), generator, Choice(0), recorders[1])
    assert recorders[0].evaluations <= recorders[1].evaluations
    committed = recorders[0].report().committed
    assert sum(n * times for n, times in enumerate(committed)) == 3 * generator.layout.length


@torch.no_grad()
def test_no_row_sees_drafts_of_another() -> None:
    """In every pass: what is predicted does not change with drafts of other rows, nor with tokens not committed."""
    generator = llamagen()
    asked = generator.predict_places
    checked = 0

    def predict(state: State, tokens: Tensor, places: Tensor, groups: Tensor | None = None):
        nonlocal checked
        assert groups is not None
        ahead = state.select(torch.arange(len(places)))
        found = asked(state, tokens, places, groups)
        last = int(groups.max())
        if last > 1:
            # Inputs of the last group: tokens one place before them.
            other = tokens.clone()
            drafts = (groups == last) & (places > 0)
            image, slot = drafts.nonzero(as_tuple=True)
            other[image, places[image, slot] - 1] += 1
            other.remainder_(11)
            again = asked(ahead, other, places, groups)
            unchanged = (groups != last) & (places >= 0)
            assert isinstance(found, Logits) and isinstance(again, Logits)
            assert torch.equal(found.logits[unchanged], again.logits[unchanged])
            assert not torch.equal(found.logits, again.logits)
            checked += 1
        return found

    generator.predict_places = predict  # type: ignore[method-assign]
    drawn(ParallelJacobi(4, 0.3), generator)
    assert checked > 3


def law_of(
    algorithm: Algorithm, grid: tuple[int, int], shared_noise, histogram
) -> tuple[Tensor, Tensor]:
    generator = TableGenerator(grid_layout(*grid, Categorical(3)), num_classes=1, spread=2.0)
    batch = 50_000
    condition = Condition(ids=torch.zeros(batch, dtype=torch.int64))
    tokens = algorithm(generator, condition, Sampling(), shared_noise(3, batch))
    law = generator.joint(Condition(ids=torch.tensor([0])), Choice())[0]
    return histogram(generator, tokens), law


@pytest.mark.parametrize(
    ("algorithm", "exact"),
    [
        (ZipAR(2), True),
        (ZipAR(1), False),
        (ParallelJacobi(4, 1.0), True),
        (ParallelJacobi(4, 0.5), False),
    ],
    ids=str,
)
def test_the_law_of_whole_images(
    algorithm: Algorithm, exact: bool, shared_noise, fits, histogram
) -> None:
    """2 x 2 tokens; one false alarm in a million (conftest.py). What is approximate is found out."""
    counts, law = law_of(algorithm, (2, 2), shared_noise, histogram)
    assert fits(counts, law) == exact


def test_what_is_refused_in_one_line() -> None:
    line = TableGenerator(sequence_layout(6, Categorical(3)))
    masked = MaskGITModel(GRID, width=32, depth=1, num_heads=4, num_classes=5)
    for algorithm in (ZipAR(2), ParallelJacobi(4)):
        with pytest.raises(UserError, match="needs categorical tokens of one grid; TableGenerator"):
            drawn(algorithm, line)
        with pytest.raises(UserError, match="does not predict in order"):
            drawn(algorithm, masked)
    with pytest.raises(UserError, match="window of ZipAR is 0"):
        ZipAR(0)
    with pytest.raises(UserError, match=r"coverage is 0.0; it must be a finite number in \(0"):
        ParallelJacobi(coverage=0.0)
    with pytest.raises(UserError, match="init is 'repeat-left'; it must be one of random, uniform"):
        ParallelJacobi(init="repeat-left")  # type: ignore[arg-type]

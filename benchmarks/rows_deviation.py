"""How far rows that are generated beside each other (ZipAR, PJD) move from the generator's law, at given settings.

    python benchmarks/rows_deviation.py [--model EXPORT] [--gray WEIGHTS] [--guidance 1.5] [--images 24]

Whole images: a table of 2 x 4 tokens of 3 codes, in which every token depends on all before it, 1,000,000 samples;
the estimated total variation, beside what the same estimate gives for plain sampling (an estimate of a distance is
never 0). With --model, a grid's generator, or --gray (gray_model.py): each token's law as the algorithm drew it against
its law given all tokens before it in the finished image, and the evaluations an image takes.
"""

import argparse

import torch
from gray_model import load_gray
from torch import Tensor

from tessellar.parity.table_generator import TableGenerator
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import Constant
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.parallel_jacobi import ParallelJacobi
from tessellar.sampling.report import Recorder
from tessellar.sampling.rows import laws
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tessellar.sampling.zipar import ZipAR

TABLE = (2, 4, 3)  # rows, columns, codes


def algorithms(columns: int) -> dict[str, Algorithm]:
    """Those that are measured, of a grid of so many columns."""
    made: dict[str, Algorithm] = {"plain": Ancestral(), "SJD, window 16": SpeculativeJacobi(16)}
    for window in sorted({columns, columns // 2, columns // 4, 1} - {0}, reverse=True):
        made[f"ZipAR, window {window}"] = ZipAR(window)
    for coverage in (1.0, 0.75, 0.5, 0.25):
        made[f"PJD, window 16, coverage {coverage}"] = ParallelJacobi(16, coverage)
    return made


def whole_images(algorithm: Algorithm, rounds: int = 10, batch: int = 100_000) -> float:
    """Estimated total variation between sampled images and their law."""
    rows, columns, codes = TABLE
    generator = TableGenerator(grid_layout(rows, columns, Categorical(codes)), num_classes=1)
    law = generator.joint(Condition(ids=torch.tensor([0])), Choice())[0]
    weights = codes ** torch.arange(rows * columns).flip(0)
    counts = torch.zeros(len(law), dtype=torch.int64)
    condition = Condition(ids=torch.zeros(batch, dtype=torch.int64))
    for number in range(rounds):
        noise = Noise(range(number * batch, (number + 1) * batch))
        tokens = algorithm(generator, condition, Sampling(), noise)
        counts += torch.bincount((tokens * weights).sum(1), minlength=len(law))
    return float((counts / counts.sum() - law).abs().sum() / 2)


class Noted:
    """A generator whose windows of places are noted: the law that each token was drawn from, or last judged by."""

    def __init__(self, generator: Generator, slots: int) -> None:
        self.generator = generator
        self.slots = (
            slots  # of a window of PJD; 0: ZipAR, whose re-read places come after the drawn ones
        )
        self.laws: dict[int, Tensor] = {}
        self._asked = generator.predict_places

    def __enter__(self) -> "Noted":
        self.generator.predict_places = self._predict  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.generator.predict_places = self._asked  # type: ignore[method-assign]

    def _predict(
        self, state: State, tokens: Tensor, places: Tensor, groups: Tensor | None = None
    ) -> Distribution:
        found = self._asked(state, tokens, places, groups)
        p = laws(found, Choice(), self.generator)[0]
        judged = places.shape[1]
        if groups is not None:
            judged = max(1, int(groups.max())) * self.slots
        for slot, place in enumerate(places[0, :judged].tolist()):
            is_read_again = groups is None and place in self.laws
            if place >= 0 and not is_read_again:
                self.laws[place] = p[slot]
        return found


def of_a_model(
    generator: Generator, algorithm: Algorithm, guidance: float, images: int
) -> tuple[float, float]:
    """Mean total variation between the law of a token as it was drawn and its law given all tokens before it in
    the finished image; and evaluations an image.
    """
    length = generator.layout.length
    recorder = Recorder()
    total = 0.0
    slots = algorithm.window if isinstance(algorithm, ParallelJacobi) else 0
    for image in range(images):
        condition = Condition(ids=torch.tensor([image % 10]))
        with Noted(generator, slots) as noted:
            sampling = Sampling(Constant(guidance), Choice(), algorithm)
            tokens = sampling.tokens(generator, condition, [image], recorder)
        state = generator.start(condition, Constant(guidance).guidance())
        exact = laws(generator.predict(state, tokens, length), Choice(), generator)[0]
        if noted.laws:
            drawn = torch.stack([noted.laws[place] for place in range(length)])
            total += float((drawn - exact).abs().sum(-1).mean() / 2)
    return total / images, recorder.report().evaluations_per_image


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="export of a class-conditional generator of a grid")
    parser.add_argument("--gray", help="weights of benchmarks/gray_model.py")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10, help="of 100,000 samples of the table")
    arguments = parser.parse_args()
    for name, algorithm in algorithms(TABLE[1]).items() if arguments.rounds else ():
        distance = whole_images(algorithm, arguments.rounds)
        print(f"table of {TABLE[0]} x {TABLE[1]}, {name}: TV {distance:.3f}", flush=True)
    if not (arguments.model or arguments.gray):
        return
    if arguments.gray:
        generator: Generator = load_gray(arguments.gray)
    else:
        model = load(arguments.model)
        assert isinstance(model, ImageGenerator)
        generator = model.generator
    grid = generator.layout.grid
    assert grid is not None, "the generator has no grid"
    for name, algorithm in algorithms(grid[1]).items():
        distance, evaluations = of_a_model(
            generator, algorithm, arguments.guidance, arguments.images
        )
        print(f"{name}: {evaluations:.1f} evaluations, TV of a token {distance:.3f}", flush=True)


if __name__ == "__main__":
    main()

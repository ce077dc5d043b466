"""What a decoding algorithm is: a frozen dataclass of its options that runs when called.

Each lies with its loop in a file of this folder; a user chooses one by its class: `--algorithm SpeculativeJacobi
--algorithm.window 32`. docs/decoding.md says how to choose.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Draws
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.noise import Noise
from tessellar.sampling.report import Recorder


class Algorithm(ABC):
    """A decoding algorithm with its options.

    `exact` says whether tokens follow the generator's guided, processed distribution.
    """

    exact: ClassVar[bool] = True
    compile: bool = False  # whether the generator runs inside a compiled function
    int8: bool = False  # whether its matrices are rounded to 8 bits

    @abstractmethod
    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance = NO_GUIDANCE,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Tokens [B, N, ...] of a batch of conditions; image b depends on its own noise and
        condition alone.

        `settings` say how tokens are drawn; a `recorder` counts what is done.
        """


def check_in_order(generator: Generator) -> None:
    """Raise UserError for a generator that cannot judge several drafts in one evaluation."""
    if isinstance(generator, MaskedGenerator):
        raise UserError(
            f"{type(generator).__name__} does not predict in order, so drafts gain nothing: use MaskGIT"
        )

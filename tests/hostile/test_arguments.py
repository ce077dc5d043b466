"""Numbers of configs by the names of arguments: what is no width, share, count or weight is refused by every class."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tessellar.callbacks.codebook_usage import CodebookUsage
from tessellar.callbacks.throughput import Throughput
from tessellar.data import (
    CachedTokensData,
    FashionMNISTData,
    HFData,
    ImageFolderData,
    ShapesData,
    WebDatasetData,
    WebDatasetStreamData,
)
from tessellar.data.crops import Resize
from tessellar.data.framing import Framing
from tessellar.errors import UserError
from tessellar.processes.flow import Times
from tessellar.protocol.arguments import (
    AMOUNTS,
    COUNTS,
    POSITIVE,
    RULES,
    SHARES,
    SIZES,
    check_arguments,
    in_ranges,
    rule_of,
)
from tessellar.protocol.configured import Configured, build
from tessellar.schedules import Schedule
from tessellar.tokenizers.flextok.flow_decoding import FlowDecoding, FlowTraining
from tessellar.tokenizers.flextok.transformer import TransformerSize
from tessellar.tokenizers.losses.adversarial import AdaptiveWeight
from tessellar.tokenizers.losses.blur_discriminator import BlurDiscriminator
from tessellar.tokenizers.losses.diff_augment import DiffAugment
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import Onset, TokenizerLoss
from tessellar.tokenizers.one_d_piece.tokenizer import TailDrop
from tessellar.tokenizers.retok import Inferred, QFormerSize
from tessellar.tokenizers.titok.tokenizer import ViTSize
from tessellar.tokenizers.tokenflow.semantic import SemanticDecoderSize
from tessellar.training.methods.context_noise import ContextNoise
from tessellar.training.methods.order_annealing import OrderAnnealing
from tessellar.training.methods.recovery import Recovery
from tessellar.training.optim import OptimizerSettings
from tests.hostile.test_sizes import changed, places, system
from tests.tiny.pairs import GENERATORS, TOKENIZERS

NAN = math.nan
MADE: dict[type, dict[str, Any]] = {
    AdaptiveWeight: {},
    BlurDiscriminator: {"channels": 32, "stages": 1},
    CachedTokensData: {"root": "x"},
    CodebookUsage: {"every": 1, "warn_below": 0.1},
    ContextNoise: {},
    DiffAugment: {},
    FashionMNISTData: {"root": "x"},
    FlowDecoding: {},
    FlowTraining: {},
    Framing: {"size": 4},
    HFData: {"path": "x", "size": 4},
    ImageFolderData: {"root": "x", "size": 4},
    Inferred: {},
    LeCam: {},
    Onset: {},
    OptimizerSettings: {},
    OrderAnnealing: {"start": 1, "end": 2},
    PatchGAN: {"channels": 8, "depth": 1},
    QFormerSize: {"width": 8, "depth": 1, "num_heads": 1},
    Reconstruction: {},
    Recovery: {},
    Resize: {"ratio": 1.1},
    Schedule: {},
    SemanticDecoderSize: {},
    ShapesData: {},
    TailDrop: {},
    Throughput: {"every": 1},
    Times: {},
    TokenizerLoss: {},
    TransformerSize: {"width": 8, "depth": 1, "head_dim": 8},
    ViTSize: {"width": 8, "depth": 1, "num_heads": 1},
    WebDatasetData: {"shards": "x", "size": 4},
    WebDatasetStreamData: {"shards": "x", "val_shards": "x", "size": 4, "epoch_length": 8},
}
BAD: dict[frozenset[str], tuple[float, ...]] = {
    SIZES: (0, -1),
    COUNTS: (-1, -(2**70)),
    SHARES: (-0.1, 1.1, NAN),
    AMOUNTS: (-1, math.inf, NAN),
    POSITIVE: (0, -1, math.inf, NAN),
}


def numeric(cls: type) -> Iterator[str]:
    """Arguments that are numbers, or sequences of them."""
    for name, parameter in inspect.signature(cls).parameters.items():
        words = str(parameter.annotation).replace("'", "")
        kinds = (
            "int",
            "float",
            "int | None",
            "float | None",
            "tuple[int, ...]",
            "tuple[float, ...]",
        )
        typed = words.removeprefix("<class ").removesuffix(">")
        if typed in kinds or typed.startswith(
            ("collections.abc.Sequence[float]", "tuple[int", "tuple[float")
        ):
            yield name


def refused(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}|adaptive weight") as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("cls", MADE, ids=lambda cls: cls.__name__)
def test_a_number_out_of_its_range_is_refused_by_its_name(cls: type) -> None:
    given = MADE[cls]
    assert type(cls(**given)) is cls
    for name in numeric(cls):
        rule = rule_of(cls, name)
        kind = next((names for names, known in RULES if known is rule), frozenset())
        annotation = str(inspect.signature(cls).parameters[name].annotation)
        for bad in BAD.get(kind, (NAN,)):
            value = (bad, bad) if "[" in annotation else bad
            refused(lambda name=name, value=value: cls(**{**given, name: value}), name)


def classes(of: type = Configured) -> Iterator[type]:
    for cls in of.__subclasses__():
        if cls.__module__.startswith("tessellar."):
            yield cls
        yield from classes(cls)


def test_the_numbers_that_a_config_may_hold_have_rules() -> None:
    """But for a few whose names say nothing: of these NaN alone is refused."""
    for name in (*TOKENIZERS, *GENERATORS):
        system(name)  # which imports what it is made of
    held = [(cls, name) for cls in {*classes(), *MADE} for name in numeric(cls)]
    without = sorted(f"{cls.__name__}.{name}" for cls, name in held if rule_of(cls, name) is None)
    assert len(without) <= len(held) // 50, without


def is_bounded(place: tuple[str | int, ...]) -> bool:
    """Whether a number of a config, by its name alone, may not be negative."""
    return any(place[-1] in names for names in (SIZES, COUNTS, SHARES, AMOUNTS, POSITIVE))


@pytest.mark.parametrize("name", [*TOKENIZERS, *GENERATORS])
def test_no_system_is_built_with_a_size_below_its_least(name: str) -> None:
    """One number of each system at a time, of its own arguments; all of them in `make check`."""
    config, _ = system(name)
    tried = [place for place in places(config) if is_bounded(place) and len(place) == 2]
    for place in tried[:: max(1, len(tried) // 3)]:
        with pytest.raises(UserError):
            build(changed(config, place, -1))


@pytest.mark.long
@pytest.mark.parametrize("name", [*TOKENIZERS, *GENERATORS])
def test_no_system_is_built_with_any_number_below_its_least(name: str) -> None:
    config, _ = system(name)
    for place in places(config):
        if is_bounded(place):
            for value in (-1, NAN):
                with pytest.raises(UserError):
                    build(changed(config, place, value))


def test_words_of_other_packages_are_their_own() -> None:
    @in_ranges
    class Theirs:
        def __init__(self, width: int, first: float = 0.0) -> None:
            self.width = width

    assert Theirs(-3).width == -3
    with pytest.raises(UserError, match="first of Theirs is nan"):
        Theirs(1, first=NAN)
    with pytest.raises(UserError, match="width of QFormerSize is True|width"):
        check_arguments(QFormerSize, {"width": [4, 0]})

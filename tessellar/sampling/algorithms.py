"""Decoding algorithms as a user chooses them: a name and options, each a frozen dataclass that runs when called.

`exact` says whether tokens follow the generator's guided, processed distribution. docs/decoding.md says how to choose.
"""

from abc import ABC, abstractmethod
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from tessellar.checkpoints.reading import read_source
from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Draws
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import Guidance, GuidanceSettings
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import GroupedRatio, distance_quantile
from tessellar.sampling.confidence import decode_by_confidence
from tessellar.sampling.couplings import COUPLINGS, Reuse
from tessellar.sampling.decode import ancestral
from tessellar.sampling.draft_model import draft_model
from tessellar.sampling.drafts import SCHEMES
from tessellar.sampling.report import Recorder
from tessellar.sampling.speculative import Rules, speculative_jacobi

Init = Literal["random", "uniform", "repeat-left", "repeat-up", "argmax-left", "sample-left"]
CouplingName = Literal["none", "maximal", "gumbel"]
assert get_args(Init) == SCHEMES and set(get_args(CouplingName)) == set(COUPLINGS)

LARGEST_WINDOW = 64


class Algorithm(ABC):
    """A decoding algorithm with its options."""

    exact: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Tokens [B, N, ...] of a batch of conditions."""

    def describe(self) -> dict[str, Any]:
        """Options as plain data."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Ancestral(Algorithm):
    """Entity by entity, one evaluation each; every generator and every head.

    `steps`: number of entities, for generators of random order.
    """

    steps: int | None = None

    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance,
        recorder: Recorder | None = None,
    ) -> Tensor:
        return ancestral(generator, condition, settings, noise, guidance, recorder, self.steps)


@dataclass(frozen=True)
class Windows(Algorithm):
    """What judges windows of drafts, which begin as `init` says, in the loop of SJD; a subclass gives the rules."""

    window: int = 16
    init: Init = "random"

    def __post_init__(self) -> None:
        if not 1 <= self.window <= LARGEST_WINDOW:
            raise UserError(f"window is {self.window}; it must be in [1, {LARGEST_WINDOW}]")
        if self.init not in SCHEMES:
            raise UserError(f"initial drafts {self.init!r} do not exist; there are {', '.join(SCHEMES)}")

    @abstractmethod
    def rules(self, generator: Generator) -> Rules:
        """When a draft is accepted, and what becomes of those behind a rejection."""

    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance,
        recorder: Recorder | None = None,
    ) -> Tensor:
        check_in_order(generator)
        rules = self.rules(generator)
        return speculative_jacobi(generator, condition, settings.choice, noise, guidance, rules, recorder)


@dataclass(frozen=True)
class SpeculativeJacobi(Windows):
    """SJD (arXiv 2410.01699) and its exact couplings (SCD, 2510.24211): no draft model, exact."""

    coupling: CouplingName = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupling not in COUPLINGS:
            raise UserError(f"coupling {self.coupling!r} does not exist; there are {', '.join(COUPLINGS)}")

    def rules(self, generator: Generator) -> Rules:
        return Rules(self.window, self.init, coupling=COUPLINGS[self.coupling])


@dataclass(frozen=True)
class ReusingJacobi(Windows):
    """SJD++ (arXiv 2512.07503): drafts behind a rejection stay where p / q exceeds `threshold`. Approximate."""

    threshold: float = 0.5

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise UserError(f"threshold is {self.threshold}; it must be at least 0")

    def rules(self, generator: Generator) -> Rules:
        return Rules(self.window, self.init, coupling=Reuse(self.threshold))


@dataclass(frozen=True)
class GroupedJacobi(SpeculativeJacobi):
    """GSD (arXiv 2508.07747): SJD that accepts by the mass of clusters of similar tokens. Approximate.

    The published `d_threshold` 0.5 fits Chameleon's embeddings: for other models give `d_quantile`, the share of pairs
    of codes that pass for near, which replaces it. `d_threshold` None switches the distance filter off.
    """

    group_size: int = 14
    p_threshold: float = 0.15
    d_threshold: float | None = 0.5
    d_quantile: float | None = None
    exact_official: bool = False

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1 or self.p_threshold <= 0:
            raise UserError(
                f"group_size is {self.group_size} and p_threshold {self.p_threshold}; both must be positive"
            )
        if self.d_quantile is not None and not 0 < self.d_quantile <= 1:
            raise UserError(f"d_quantile is {self.d_quantile}; it must be in (0, 1]")

    def acceptance(self, generator: Generator) -> GroupedRatio:
        """The acceptance rule with the generator's embeddings; raises UserError where it has none."""
        threshold, table = self.d_threshold, None
        if self.d_quantile is not None or threshold is not None:
            embedding = getattr(generator, "token_embedding", None)
            if not isinstance(embedding, nn.Embedding):
                name = type(generator).__name__
                raise UserError(
                    f"GSD's distance filter needs one embedding a code, {name} has none; set d_threshold null"
                )
            table = embedding.weight.detach().float()
            threshold = threshold if self.d_quantile is None else distance_quantile(table, self.d_quantile)
        return GroupedRatio(self.group_size, self.p_threshold, threshold, table, self.exact_official)

    def rules(self, generator: Generator) -> Rules:
        return Rules(self.window, self.init, self.acceptance(generator), COUPLINGS[self.coupling])


@dataclass(frozen=True)
class DraftModel(Algorithm):
    """Speculative decoding (arXiv 2211.17192) with the generator at `model`: an export of the same layout. Exact.

    `drafts` entities are drafted for each evaluation; `guidance_scale` guides the draft model alone (default: as the
    generator).
    """

    model: str
    drafts: int = 4
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.drafts < LARGEST_WINDOW:
            raise UserError(f"drafts is {self.drafts}; it must be in [1, {LARGEST_WINDOW})")

    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance,
        recorder: Recorder | None = None,
    ) -> Tensor:
        check_in_order(generator)
        parameter = next(generator.parameters())
        draft = _load_generator(self.model).to(parameter.device, parameter.dtype)
        own = None if self.guidance_scale is None else GuidanceSettings(self.guidance_scale).make()
        return draft_model(generator, draft, condition, settings.choice, noise, guidance, own, self.drafts, recorder)


@dataclass(frozen=True)
class MaskGIT(Algorithm):
    """Decoding by confidence (arXiv 2202.04200) of a masked generator, in `steps` evaluations. Approximate.

    Draws and confidences have noise of `temperature`, falling to 0; `anneal` also cools the logits. The sampler's
    temperature and filters have no part in it.
    """

    steps: int = 8
    temperature: float = 1.0
    anneal: bool = True

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.temperature < 0:
            raise UserError(f"maskgit needs at least 1 step and a temperature of at least 0, not {self}")

    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance,
        recorder: Recorder | None = None,
    ) -> Tensor:
        if not isinstance(generator, MaskedGenerator):
            raise UserError(f"algorithm maskgit needs a masked generator; {type(generator).__name__} predicts in order")
        if settings.choice != Choice():
            raise UserError("algorithm maskgit has a temperature of its own: set it there, and leave choice as it is")
        arguments = (noise, guidance, self.steps, self.temperature, self.anneal, recorder)
        return decode_by_confidence(generator, condition, *arguments)


@lru_cache(maxsize=2)
def _load_generator(path: str) -> Generator:
    source = read_source(path)
    if source.kind != "generator":
        raise UserError(f"{path} is a tokenizer; a draft model is a generator")
    generator = source.build("generator")
    generator.bind(source.build("tokenizer"))
    return generator.eval()


def check_in_order(generator: Generator) -> None:
    """Raise UserError for a generator that cannot judge several drafts in one evaluation."""
    if isinstance(generator, MaskedGenerator):
        raise UserError(f"{type(generator).__name__} does not predict in order, so drafts gain nothing: use maskgit")


ALGORITHMS: dict[str, type[Algorithm]] = {
    "ancestral": Ancestral,
    "sjd": SpeculativeJacobi,
    "sjd++": ReusingJacobi,
    "gsd": GroupedJacobi,
    "draft": DraftModel,
    "maskgit": MaskGIT,
}


def make_algorithm(name: str, options: dict[str, Any]) -> Algorithm:
    """The algorithm of that name; raises UserError for unknown names, unknown options and values out of range."""
    if name not in ALGORITHMS:
        raise UserError(f"decoding algorithm {name!r} does not exist; there are {', '.join(ALGORITHMS)}")
    known = {f.name: f for f in fields(ALGORITHMS[name])}  # type: ignore[arg-type]
    hints = get_type_hints(ALGORITHMS[name])
    for key, value in options.items():
        if key not in known:
            there = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"decoding algorithm {name!r} has no option {key!r}; {there}")
        if not _fits(value, hints[key]):
            raise UserError(f"option {key!r} of algorithm {name!r} is {value!r}; it must be {_spelled(hints[key])}")
    missing = [key for key, f in known.items() if f.default is MISSING and key not in options]
    if missing:
        raise UserError(f"decoding algorithm {name!r} needs its option {missing[0]!r}")
    return ALGORITHMS[name](**options)


def _spelled(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has the type of an option; an int will do for a float, names are checked elsewhere."""
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    allowed = (int, float) if hint is float else hint
    return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))

"""Replays of searches that the official code ran over toy tables: best-of-N, beam, look-ahead, uniform prior.

What is likeliest is generated anew by our priors; what was sampled is answered from the recording, and requests,
scores and selections are compared. Quirks of the official code are switched on (`exact_official`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.options import check_options, require
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import choice_of
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.sampling.search.beam import Beam, Lookahead
from tessellar.sampling.search.best_of import BestOfN
from tessellar.sampling.search.priors import Branching, Pool, Prior
from tessellar.sampling.search.schedules import Even, Geometric, Listed, SearchSchedule
from tessellar.sampling.search.searching import Found, Search, Task
from tessellar.sampling.search.verifiers import (
    Candidates,
    Ensemble,
    Likelihood,
    Subject,
    Verifier,
)
from tessellar.sampling.settings import Sampling

SYSTEM = "ordered_token_search"
OPTIONS = (
    "n_samples batch_size sample beam_width candidates_per_beam max_steps token_schedule tokens_per_step "
    "replacement scale_first_step complete_after_search lookahead_number max_lookahead_step"
).split()
"""Options of the official searches that the replays read."""


class ToyGenerator(Generator):
    """Logits at position j: A[p, j] + s[p] B[x_(j-1)] + C[x_(j-2)] + mean of H[x_i] over i < j, of prompt p."""

    def __init__(self, codes: int, length: int, prompts: int) -> None:
        super().__init__()
        self.layout = sequence_layout(length, Categorical(codes), min_prefix=1)
        self.entities = token_order(self.layout)
        self.conditioning = ClassConditioning(prompts)
        sizes = {
            "A": (prompts + 1, length + 1, codes),
            "B": (codes + 1, codes),
            "C": (codes + 1, codes),
            "H": (codes, codes),
            "s": (prompts + 1,),
        }
        self.tables = torch.nn.ParameterDict()
        for name, size in sizes.items():
            self.tables[name] = torch.nn.Parameter(torch.zeros(size))

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        fed = torch.zeros(condition.batch, dtype=torch.int64)
        rows = self.stack_branches(condition, guidance)
        return State(rows, guidance, entities or self.entities, fed)

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Logits:
        want = count if want is None else want
        state.advance(count)
        first = int(state.fed[0]) - want
        assert state.condition.ids is not None
        logits = self.logits_at(state.rows(tokens), state.condition.ids, first, want)
        return Logits(state.merge(logits, state.entities.entity_of(state.fed - want, want)))

    def logits_at(self, tokens: Tensor, prompt: Tensor, first: int, count: int) -> Tensor:
        """Logits [R, count, V] at positions from `first` on, of prompts [R]."""
        none = self.tables["B"].shape[0] - 1  # the entry for "no token"
        padded = F.pad(tokens, (2, 0), value=none)
        positions = torch.arange(first, first + count)
        one_before = self.tables["B"][padded[:, positions + 1]]
        two_before = self.tables["C"][padded[:, positions]]
        sums = F.pad(self.tables["H"][tokens].cumsum(1), (0, 0, 1, 0))[:, positions]
        means = sums / positions.clamp(min=1)[:, None]
        strength = self.tables["s"][prompt][:, None, None]
        return self.tables["A"][prompt][:, positions] + strength * one_before + two_before + means

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        scores = self.predict(self.start(condition), tokens, self.entities.count)
        return {"cross_entropy": scores.cross_entropy(tokens, weight)}


class ToyTokenizer(Tokenizer):
    """Images that are vectors [n, D]: the normalised sum of w[j] E[x_j] over the tokens that there are."""

    def __init__(self, codes: int, length: int, dim: int, eps: float) -> None:
        super().__init__()
        self.layout = sequence_layout(length, Categorical(codes), min_prefix=1)
        self.image_size = (1, 1)
        self.codes = torch.nn.Parameter(torch.zeros(codes, dim))
        self.weights = torch.nn.Parameter(torch.zeros(length))
        self.eps = eps

    def encode(self, images: Any) -> Tensor:
        raise UserError("the toy tokenizer only decodes")

    def forward(self, images: Tensor) -> TokenizerOutput:
        raise UserError("the toy tokenizer only decodes")

    @property
    def last_layer(self) -> Tensor:
        return self.codes

    def decode(self, tokens: Tensor) -> Tensor:
        weights = self.weights[: tokens.shape[1], None]
        total = (weights * self.codes[tokens]).sum(1)
        return total / (total.norm(dim=-1, keepdim=True) + self.eps)


@dataclass(frozen=True)
class ToyImage(Verifier):
    """<image, target of the prompt>."""

    targets: Tensor | None = None

    def check(self, subject: Subject) -> None:
        """Every prompt has a target."""

    def measure(self, candidates: Candidates) -> Tensor:
        assert candidates.images is not None and self.targets is not None
        assert candidates.subject.label is not None
        return (candidates.images @ self.targets[candidates.subject.label])[:, None]


@dataclass
class Log:
    """Outputs of one case by their names, in the order of its calls."""

    case: str
    outputs: Outputs = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def next(self, kind: str) -> str:
        """`CASE/gen3`, and the next number from now on."""
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        return f"{self.case}/{kind}{number}"


@dataclass(frozen=True)
class LoggedVerifier(Verifier):
    """A verifier whose scores are outputs; `always` decodes images that it does not need, as the official
    best-of-N does.
    """

    inner: Verifier
    log: Log
    always: bool = False

    @property
    def needs_images(self) -> bool:  # type: ignore[override]
        return self.always or self.inner.needs_images

    def check(self, subject: Subject) -> None:
        self.inner.check(subject)

    def measure(self, candidates: Candidates) -> Tensor:
        return self.inner.measure(candidates)

    def scores(self, measured: Tensor) -> Tensor:
        scores = self.inner.scores(measured)
        self.log.outputs[f"{self.log.next('score')}/scores"] = scores
        return scores


@dataclass
class LoggedPrior(Prior):
    """A prior whose requests and answers are outputs."""

    inner: Prior
    log: Log

    def __post_init__(self) -> None:
        self.entities = self.inner.entities

    def begin(self, given: Tensor | None = None, known: int = 0) -> Pool:
        return self.inner.begin(given, known)

    def extend(self, beams: Pool, known: int, candidates: int, how: Branching) -> Pool:
        pool = self.inner.extend(beams, known, candidates, how)
        name = self.log.next("gen")
        self.log.outputs[f"{name}/input"] = beams.tokens[:, : beams.known]
        self.log.outputs[f"{name}/output"] = pool.tokens[:, : pool.known]
        if pool.last is not None:
            self.log.outputs[f"{name}/log_probs"] = pool.last[:, None]
        return pool


@dataclass
class RecordedPrior(Prior):
    """Answers from the recording."""

    recording: Recording
    log: Log
    entities: Entities
    length: int

    def begin(self, given: Tensor | None = None, known: int = 0) -> Pool:
        assert given is None
        return Pool(torch.zeros(1, self.length, dtype=torch.int64), known, torch.arange(1))

    def extend(self, beams: Pool, known: int, candidates: int, how: Branching) -> Pool:
        name = self.log.next("gen")
        self.log.outputs[f"{name}/input"] = beams.tokens[:, : beams.known]
        answer = self.recording.inputs[f"{name}/output"]
        last = None
        if f"{name}/log_probs" in self.recording.inputs:
            last = self.recording.inputs[f"{name}/log_probs"][:, 0].double()
        parents = torch.arange(len(beams)).repeat_interleave(len(answer) // len(beams))
        tokens = F.pad(answer, (0, self.length - known))
        return Pool(tokens, known, parents, log_prob=last, last=last)


@replays(SYSTEM, "toy")
def toy(recording: Recording) -> Outputs:
    """The tables themselves."""
    tokens = recording.inputs["toy/check_tokens"]
    prompts = recording.inputs["toy/check_pid"]
    logits = generator_of(recording).logits_at(tokens, prompts, 0, tokens.shape[1] + 1)
    return {
        "toy/check_logits": logits,
        "toy/check_image": tokenizer_of(recording).decode(tokens),
    }


@replays(SYSTEM, "filter")
def filters(recording: Recording) -> Outputs:
    """Temperature and filters."""
    logits = recording.inputs["filter/logits"]
    return {
        name: choice_of(settings).probs(logits)
        for name, settings in recording.each("filter/probs_*")
    }


@replays(SYSTEM, "bon*", "beam_*", "look*")
def searches(recording: Recording) -> Outputs:
    """All searches."""
    outputs: Outputs = {}
    for case in recording.config["cases"]:
        if case["name"] in recording.cases:
            outputs |= searched(recording, case)
    return outputs


def generator_of(recording: Recording) -> ToyGenerator:
    config = recording.config
    generator = ToyGenerator(config["vocab_size"], config["max_tokens"], len(config["prompts"]))
    state = {}
    for name in generator.tables:
        state[f"tables.{name}"] = recording.weights["model"][f"ar/{name}"]
    load_strict(generator, state, "the recorded tables")
    return generator


def tokenizer_of(recording: Recording) -> ToyTokenizer:
    eps = recording.case_settings["toy"]["normalise_eps"]
    config = recording.config
    tokenizer = ToyTokenizer(
        config["vocab_size"], config["max_tokens"], dim=config["image_dim"], eps=eps
    )
    tables = recording.weights["model"]
    state = {"codes": tables["dec/E"], "weights": tables["dec/w"]}
    load_strict(tokenizer, state, "the recorded tables")
    return tokenizer


def searched(recording: Recording, case: Mapping[str, Any]) -> Outputs:
    """Outputs of one case that are recorded."""
    log = Log(case["name"])
    generator = generator_of(recording)
    tokenizer = tokenizer_of(recording)
    length = generator.layout.length
    search = search_of(recording, case, log)

    def decoder(tokens: Tensor, known: int) -> Tensor:
        log.outputs[f"{log.next('dec')}/tokens"] = tokens[:, :known]
        return tokenizer.decode(tokens[:, :known])

    def sampler(seeds: list[int]) -> tuple[Tensor, Tensor | None]:
        name = log.next("gen")
        log.outputs[f"{name}/input"] = torch.zeros(len(seeds), 0, dtype=torch.int64)
        answer = recording.inputs[f"{name}/output"]
        return answer, recording.inputs[f"{name}/log_probs"][:, 0]

    given = None
    known = 0
    if "initial_tokens" in case:
        start = torch.tensor(case["initial_tokens"])
        known = start.shape[1]
        given = F.pad(start, (0, length - known))
    task = Task(
        generator=generator,
        tokenizer=tokenizer,
        condition=Condition(ids=torch.tensor([case["prompt"]])),
        sampling=sampling_of({**case["generation_kwargs"], **case.get("gen", {})}),
        seed=case["seed"],
        subject=Subject(label=case["prompt"]),
        given=given,
        known=known,
        decoder=decoder,
        sampler=sampler,
    )
    if isinstance(search, Beam):
        if search.sample:
            task.prior = RecordedPrior(recording, log, generator.entities, length)
        else:
            task.prior = LoggedPrior(task.generator_prior(search.unconditional), log)
    found = search(task, results=case["num_results"])
    # Finishing the sequences is a step of ours.
    steps = found.steps[: case["result_metadata"].get("num_steps", 1)]
    found = replace(found, steps=steps)
    made = log.outputs | result_of(case["name"], found, case["num_results"])
    # Ours decodes the results of best-of-N and of finished sequences once more.
    return {name: made[name] for name in recording.names("output", {case["name"]}) if name in made}


def result_of(case: str, found: Found, results: int) -> Outputs:
    """What a search returns, by the recorded names."""
    outputs = {
        f"{case}/result/tokens": found.tokens[:, : found.known],
        f"{case}/result/display_tokens": found.shown[:, : found.known],
        f"{case}/result/images": found.images,
        f"{case}/result/scores": found.scores,
    }
    for number, step in enumerate(found.steps):
        outputs[f"{case}/step{number}/kept_tokens"] = step.tokens[:, : step.known]
        outputs[f"{case}/step{number}/top_tokens"] = step.tokens[:results, : step.known]
        outputs[f"{case}/step{number}/top_scores"] = step.scores[:results]
    outputs[f"{case}/result/step_scores"] = torch.stack([step.scores[0] for step in found.steps])
    return outputs


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    require(settings, "the recorded search", {"num_samples": 1, "return_probs": True})
    scale = settings["cfg_factor"]
    return Sampling(guidance=Constant(1.0 if scale is None else scale), choice=choice_of(settings))


def search_of(recording: Recording, case: Mapping[str, Any], log: Log) -> Search:
    """Our search with the official options."""
    config = case["config"]
    check_options(config, f"the config of case {case['name']!r}", read=OPTIONS)
    best_of_n = case["algo"] == "best_of_n"
    verifier = LoggedVerifier(verifier_of(recording, case["verifier"]), log, always=best_of_n)
    if best_of_n:
        count = config["n_samples"]
        batch = config.get("batch_size", count)
        return BestOfN(verifier, batch_size=batch, count=count, exact_official=True)
    options: dict[str, Any] = {
        "verifier": verifier,
        "width": config["beam_width"],
        "candidates": config["candidates_per_beam"],
        "schedule": schedule_of(config),
        # The uniform prior always draws.
        "sample": config["sample"] or case.get("prior") == "uniform",
        "replacement": config.get("replacement", False),
        "scale_first_step": config.get("scale_first_step", False),
        "complete": config.get("complete_after_search", False),
        "unconditional": case.get("uncond", False),
        "exact_official": True,
    }
    if case["algo"] == "beam":
        return Beam(**options)
    return Lookahead(
        **options, ahead=config["lookahead_number"], until=config.get("max_lookahead_step", -1)
    )


def schedule_of(config: Mapping[str, Any]) -> SearchSchedule:
    kind = config["token_schedule"]
    if isinstance(kind, list):
        return Listed(at=tuple(kind))
    if kind == "geometric":
        return Geometric(config["max_steps"])
    if kind == "linear":
        return Even(config["max_steps"], every=config["tokens_per_step"])
    if kind == "fixed":
        return Even(config["max_steps"])
    raise UserError(f"the token schedule {kind!r} is not known")


def verifier_of(recording: Recording, settings: Mapping[str, Any]) -> Verifier:
    tables = recording.weights["model"]
    match settings["name"]:
        case "toy_image":
            return ToyImage(tables["ver/target"])
        case "toy_image2":
            return ToyImage(tables["ver/target2"])
        case "likelihood":
            return Likelihood(exact_official=True)
        case "ensemble":
            members = settings["verifiers"]
            return Ensemble(
                verifiers=[verifier_of(recording, member) for member in members],
                weights=tuple(member["weight"] for member in members),
                by=settings["aggregation"],
                exact_official=True,
            )
    raise UserError(f"the verifier {settings['name']!r} is not known")

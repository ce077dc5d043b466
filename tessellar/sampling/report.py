"""Report: what a decoding algorithm did. Evaluations of the network, what each of them committed,
and where time went.

An algorithm is handed a `Recorder` (or none) and tells it of every evaluation; `Recorder.report()`
sums up.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """Numbers of one sampling run. Network evaluations count windows of an image: guidance does not
    double them.
    """

    images: int
    tokens: int  # committed
    evaluations: int  # of the generator, summed over images
    draft_evaluations: int  # of a draft model, summed over images
    solver_evaluations: int  # of a flow or a diffusion head by its solver, summed over images
    passes: int  # forward passes, each for a whole batch
    tried: list[int]  # by window slot: how often the acceptance test of its draft was reached
    accepted: list[int]  # by window slot: how often the draft was accepted
    committed: list[int]  # committed[n]: evaluations that committed n entities
    begun: list[int]  # by entity: evaluations whose window began there
    gained: list[int]  # by entity: entities that those evaluations committed
    seconds: float
    network_seconds: float
    nats: float | None = None  # entropy of the laws of the tokens, summed, if it was recorded
    uncertain_tokens: int | None = None  # tokens of entropy above 0.5 nat, if entropy was recorded
    uncertain_drafted: int | None = None  # those of them that were accepted drafts

    @property
    def evaluations_per_image(self) -> float:
        return self.evaluations / max(self.images, 1)

    @property
    def tokens_per_evaluation(self) -> float:
        return self.tokens / max(self.evaluations, 1)

    @property
    def acceptance(self) -> list[float]:
        """By window slot: the share of reached drafts that were accepted."""
        return [a / t if t else 0.0 for a, t in zip(self.accepted, self.tried, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self),
            "evaluations_per_image": self.evaluations_per_image,
            "tokens_per_evaluation": self.tokens_per_evaluation,
            "acceptance": self.acceptance,
            "other_seconds": self.seconds - self.network_seconds,
        }

    def __str__(self) -> str:
        outside = self.seconds - self.network_seconds
        lines = [
            f"{self.images} images, {self.tokens} tokens, {self.evaluations_per_image:.1f} network evaluations an image"
            f" ({self.tokens_per_evaluation:.2f} tokens an evaluation)",
            f"{self.seconds:.2f} s: {self.network_seconds:.2f} s in the network, {outside:.2f} s outside it",
        ]
        if self.solver_evaluations:
            lines.append(
                f"{self.solver_evaluations / max(self.images, 1):.1f} evaluations of the solver an image"
            )
        if self.draft_evaluations:
            lines.append(
                f"{self.draft_evaluations / max(self.images, 1):.1f} draft evaluations an image"
            )
        if any(self.tried):
            lines.append(
                "acceptance by window slot: " + " ".join(f"{a:.2f}" for a in self.acceptance)
            )
        return "\n".join(lines)


# nat; tokens above it are "uncertain": flat backgrounds flatter acceptance.
ENTROPY_FLOOR = 0.5


@dataclass
class Recorder:
    """Collects what a run does; may be handed to several runs one after the other. `entropy` costs
    one pass over p.
    """

    entropy: bool = False
    images: int = 0
    tokens: int = 0
    evaluations: int = 0
    draft_evaluations: int = 0
    solver_evaluations: int = 0
    passes: int = 0
    seconds: float = 0.0
    network_seconds: float = 0.0
    nats: float = 0.0
    uncertain_tokens: int = 0
    uncertain_drafted: int = 0
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    gained: list[int] = field(default_factory=list)

    @contextmanager
    def run(self, images: int, tokens: int, device: torch.device) -> Iterator[None]:
        """One run of a decoding algorithm over `images` images of `tokens` tokens each."""
        started = _now(device)
        yield
        self.seconds += _now(device) - started
        self.images += images
        self.tokens += images * tokens

    @contextmanager
    def network(self, device: torch.device) -> Iterator[None]:
        """One forward pass of any network."""
        started = _now(device)
        yield
        self.network_seconds += _now(device) - started
        self.passes += 1

    def solved(
        self, model: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The model of a solver, of (x [B, ...], time), whose calls count as time in the network."""

        def call(x: Tensor, time: Tensor) -> Tensor:
            self.solver_evaluations += len(x)
            with self.network(x.device):
                return model(x, time)

        return call

    def window(self, first: Tensor, accepted: Tensor, committed: Tensor, drafted: Tensor) -> None:
        """One evaluation of images that are not finished, each [b], on the CPU.

        Windows begin at entities `first`; `accepted` of their `drafted` drafts stand before the
        first rejection.
        """
        self.evaluations += len(first)
        self.committed = _add(self.committed, torch.bincount(committed))
        self.begun = _add(self.begun, torch.bincount(first))
        self.gained = _add(self.gained, torch.bincount(first, weights=committed.double()).long())
        slot = torch.arange(int(drafted.max()))
        there = slot < drafted[:, None]
        self.tried = _add(self.tried, (there & (slot <= accepted[:, None])).sum(0))
        self.accepted = _add(self.accepted, (there & (slot < accepted[:, None])).sum(0))

    def plain(self, first: Tensor) -> None:
        """One evaluation without drafts, for entities `first` [b]."""
        self.window(first, torch.zeros_like(first), torch.ones_like(first), torch.zeros_like(first))

    def certainty(self, p: Tensor, drafted: Tensor, committed: Tensor) -> None:
        """Entropy of committed tokens: laws p [..., V], flags [...] of accepted drafts and of
        committed tokens.
        """
        if self.entropy:
            entropy = torch.special.entr(p).sum(-1)
            uncertain = (entropy > ENTROPY_FLOOR) & committed
            self.nats += float(torch.where(committed, entropy, 0).double().sum())
            self.uncertain_tokens += int(uncertain.sum())
            self.uncertain_drafted += int((uncertain & drafted).sum())

    def report(self) -> Report:
        facts = {name: getattr(self, name) for name in Report.__dataclass_fields__}
        if not self.entropy:
            facts["nats"] = facts["uncertain_tokens"] = facts["uncertain_drafted"] = None
        return Report(**facts)


def _add(counts: list[int], more: Tensor) -> list[int]:
    longest = max(len(counts), len(more))
    pad = counts + [0] * (longest - len(counts))
    return [a + b for a, b in zip(pad, more.tolist() + [0] * (longest - len(more)), strict=True)]


def _now(device: torch.device) -> float:
    """Wall-clock seconds with all work on the device finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def running(
    recorder: Recorder | None, images: int, tokens: int, device: torch.device
) -> AbstractContextManager[None]:
    """`recorder.run`, or nothing to do without a recorder."""
    return nullcontext() if recorder is None else recorder.run(images, tokens, device)


def forward(recorder: Recorder | None, device: torch.device) -> AbstractContextManager[None]:
    """`recorder.network`, or nothing to do without a recorder."""
    return nullcontext() if recorder is None else recorder.network(device)

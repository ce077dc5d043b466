"""Choice: from logits to processed probabilities to a token. Temperature, top-k, top-p and min-p
are defined here once.

Order of processing (LlamaGen, arXiv 2406.06525, `generate.py`): temperature, then top-k keeping
every logit >= the k-th largest (ties stay), then top-p keeping the smallest set of largest
probabilities whose mass exceeds p, then min-p.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_list, check_number, check_whole

COLDEST = 1e-4  # below it, logits divided by it leave the range of float32
HOTTEST = 1e6


@dataclass(frozen=True)
class Choice:
    """How a token is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter
    off.

    `further_temperatures` are those of the sub-tokens behind the first, where a token has several;
    the last one goes on. Without them, all have `temperature`. `bit_steps` are the numbers of bits
    that each step of a head that unmasks bits sets (BAR); without them, there are four even ones.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    further_temperatures: tuple[float, ...] = ()
    bit_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("further_temperatures", "bit_steps"):
            object.__setattr__(self, name, check_list(name, getattr(self, name)))
        for count in self.bit_steps:
            check_whole("bit_steps", count, least=1)
        for temperature in (self.temperature, *self.further_temperatures):
            check_number("temperature", temperature, least=0, most=HOTTEST)
            if 0 < temperature < COLDEST:
                raise UserError(
                    f"temperature is {temperature}; it must be 0, which is greedy, or at least {COLDEST}"
                )
        check_whole("top_k", self.top_k, least=0)
        check_number("top_p", self.top_p, above=0, most=1)
        check_number("min_p", self.min_p, least=0)
        if self.min_p >= 1:
            raise UserError(f"min_p is {self.min_p}; it must be below 1")

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn, however they are scored."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the scores as they are."""
        further = all(temperature == 1 for temperature in self.further_temperatures)
        return self.temperature == 1 and further and not self.filters

    def of_factor(self, factor: int) -> "Choice":
        """How sub-token `factor` of a token is drawn."""
        further = self.further_temperatures
        if not further:
            return self
        own = self.temperature if factor == 0 else further[min(factor, len(further)) - 1]
        return replace(self, temperature=own, further_temperatures=())

    def probs(self, logits: Tensor) -> Tensor:
        """Processed probabilities [..., V], float32, of `logits` [..., V]. Greedy gives a one-hot
        at the argmax.
        """
        logits = logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(
                logits < logits.topk(self.top_k).values[..., -1:], -torch.inf
            )
        if self.top_p < 1:
            logits = top_p_filter(logits, self.top_p)
        probs = logits.softmax(-1)
        if self.min_p > 0:
            probs = probs.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs

    def draw(self, logits: Tensor, noise: Noise) -> Tensor:
        """Token ids [B, ...] of logits [B, ..., V]; one Exp(1) value a vocabulary entry is drawn
        from `noise`.
        """
        return race(self.probs(logits), noise.exponential(*logits.shape[1:]))


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Logits with everything outside the nucleus at -inf (arXiv 1904.09751); at least one entry
    stays.
    """
    ordered, index = logits.sort(dim=-1, descending=True)
    mass_before = F.pad(ordered.softmax(-1).cumsum(-1)[..., :-1], (1, 0))
    outside = mass_before > top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)


def race(probs: Tensor, exponential: Tensor) -> Tensor:
    """Sample the categorical `probs` [..., V]: argmax of probs / Exp(1), the exponential race."""
    return (probs / exponential).argmax(-1)

"""GRPO on roll-outs (arXiv 2402.03300; for image tokens AR-GRPO, arXiv 2508.06924): whole images are
drawn from the generator's own tokens, `group_size` of one condition, and judged by rewards.

The policy that is trained is the one that drew: with the guidance, the temperature and the filters
of `sampling`, unless `guided` or `filtered` says otherwise. In the first update of a roll-out old
log-probabilities are the new ones and ratios 1: the value of the loss is 0, its gradient is not.
Further `passes` over the same roll-out are clipped where they have gone far enough.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.models.parts.prefix_transformer import generated
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import AMOUNTS, SIZES, in_ranges
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.generator import Generator
from tessellar.sampling.settings import Sampling
from tessellar.training.alignment.drawing import require_group, require_warm
from tessellar.training.alignment.method import (
    AlignmentMethod,
    Batch,
    Terms,
    decoded,
    in_mode,
    score,
)
from tessellar.training.alignment.policy import (
    clipped_surrogate,
    group_advantages,
    k3,
    log_probs,
    policy_facts,
)
from tessellar.training.alignment.rewards import Drawn, Reward, repeated
from tessellar.training.random_state import new_seeds


class RollOut(NamedTuple):
    """Images of R rows: tokens [R, N, ...], their conditions, advantages [R], rewards [number of
    rewards, R] and log-probabilities [R, N] under the policy that drew them.
    """

    tokens: Tensor
    condition: Condition
    advantages: Tensor
    rewards: Tensor
    old: Tensor | None = None

    def to(self, device: torch.device) -> "RollOut":
        parts = [None if part is None else part.to(device) for part in self]
        return RollOut(*parts)  # type: ignore[arg-type]


@in_ranges
class GRPO(AlignmentMethod):
    """`rewards` each have advantages of their own within a group, which their weights add up.

    `kl` weighs the distance (k3, token by token) to the generator as it began. `scale` divides
    advantages by the group's deviation (without it: Dr. GRPO); `ratio` is a token's or, as in GSPO,
    the geometric mean over a sequence. `passes` updates are made by each roll-out; data that come in
    between are not read. Raises UserError for a group of one, no reward or a greedy choice.
    """

    ranges: ClassVar = {
        "group_size": SIZES,
        "decode_at_once": SIZES,
        "passes": SIZES,
        "kl": AMOUNTS,
        "clip_range": AMOUNTS,
    }

    def __init__(
        self,
        rewards: list[Reward],
        sampling: Sampling = Sampling(),  # noqa: B008
        group_size: int = 8,
        clip_range: float = 0.2,
        kl: float = 0.0,
        scale: bool = True,
        ratio: Literal["token", "sequence"] = "token",
        guided: bool = True,
        filtered: bool = True,
        eps: float = 1e-4,
        decode_at_once: int = 8,
        passes: int = 1,
    ) -> None:
        super().__init__()
        require_group(group_size)
        require_warm(sampling.choice)
        if not rewards:
            raise UserError("GRPO needs at least one reward")
        self.all_rewards = nn.ModuleList(rewards)
        self.sampling = sampling
        self.group_size = group_size
        self.clip_range = clip_range
        self.kl = kl
        self.scale = scale
        self.ratio = ratio
        self.guided = guided
        self.filtered = filtered
        self.eps = eps
        self.decode_at_once = decode_at_once
        self.passes = passes
        self._rolled_out: dict[int, RollOut] = {}  # by the part of an update

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    @property
    def rewards(self) -> Sequence[Reward]:
        return list(self.all_rewards)  # type: ignore[arg-type]

    def terms(self, model: ImageGenerator, batch: Batch) -> Terms:
        drawn = self._rolled_out.pop(batch.part, None)
        if drawn is None or batch.update % self.passes == 0:
            drawn = self.roll_out(model, batch)
        drawn = drawn.to(batch.tokens.device)
        tokens = drawn.tokens
        condition = drawn.condition
        new = self.log_probs(model.generator, tokens, condition)
        old = new.detach() if drawn.old is None else drawn.old
        if self.passes > 1:
            self._rolled_out[batch.part] = drawn._replace(old=old)
        surrogate = clipped_surrogate(
            self.of_ratio(new), self.of_ratio(old), drawn.advantages, self.clip_range
        )
        each = surrogate.loss
        total = drawn.rewards.sum(0)
        logged = policy_facts(total, surrogate, self.group_size, self.clip_range)
        for reward, values in zip(self.rewards, drawn.rewards, strict=True):
            logged[f"reward_{type(reward).__name__}"] = values.mean()
        if self.kl:
            assert self.reference is not None
            with torch.no_grad():
                reference = self.log_probs(self.reference, tokens, condition)
            divergence = k3(reference, new)
            each = each + self.kl * divergence
            logged["kl"] = divergence.mean()
        return Terms({"policy": each.mean()}, logged)

    def roll_out(self, model: ImageGenerator, batch: Batch) -> RollOut:
        """Draw a group for each condition of a batch, and judge it."""
        rows = torch.arange(batch.condition.batch).repeat_interleave(self.group_size)
        condition = batch.condition.select(rows)
        tokens = model.sample_tokens(condition, self.sampling, new_seeds(len(rows)))
        rewards, advantages = self.judged(model, batch, tokens)
        return RollOut(tokens, condition, advantages, rewards)

    def kept(self) -> dict[str, Any]:
        """Roll-outs that are used again."""
        found = {}
        for part, drawn in self._rolled_out.items():
            found[str(part)] = {**drawn._asdict(), "condition": drawn.condition._asdict()}
        return found

    def put_back(self, kept: Mapping[str, Any]) -> None:
        self._rolled_out = {}
        for part, drawn in kept.items():
            condition = Condition(**drawn["condition"])
            self._rolled_out[int(part)] = RollOut(**{**drawn, "condition": condition})

    def of_ratio(self, values: Tensor) -> Tensor:
        """Log-probabilities [R, N] of tokens, or their mean [R, 1] over a sequence."""
        return values if self.ratio == "token" else values.mean(1, keepdim=True)

    @torch.no_grad()
    def judged(self, model: ImageGenerator, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [number of rewards, R] and advantages [R] of what was drawn."""
        images = decoded(model, tokens, self.decode_at_once)
        originals = None
        if any(reward.reads_originals for reward in self.rewards):
            originals = batch.images.repeat_interleave(self.group_size, 0)
        drawn = Drawn(images, originals, repeated(batch.data, self.group_size))
        values: list[Tensor] = []
        advantages = torch.zeros(len(tokens), device=tokens.device)
        with torch.autocast(images.device.type, enabled=False):
            for reward in self.rewards:
                values.append(reward(drawn))
                own = group_advantages(values[-1], self.group_size, self.eps, scale=self.scale)
                advantages = advantages + reward.weight * own
        return torch.stack(values), advantages

    def log_probs(self, generator: Generator, tokens: Tensor, condition: Condition) -> Tensor:
        """Of tokens [R, N, ...] under the policy, in eval mode; [R, N] in generation order."""
        with in_mode(generator, False):
            scores = self.policy(generator, tokens, condition)
        return log_probs(scores, generated(tokens, generator.entities))

    def policy(self, generator: Generator, tokens: Tensor, condition: Condition) -> Distribution:
        """Scores as they are drawn from: guided, at the temperature, filtered."""
        guidance = self.sampling.guidance.guidance()
        choice = self.sampling.choice
        entities = generator.entities
        if not self.guided or guidance.schedule is None:
            scores = score(generator, tokens, condition)
        else:
            rows = torch.cat([tokens] * guidance.branches)
            branches = generator.stack_branches(condition, guidance)
            scores = score(generator, rows, branches)
            if isinstance(scores, Logits):
                first = torch.zeros(len(tokens), dtype=torch.int64)
                entity = entities.entity_of(first, entities.count)
                scores = Logits(guidance.merge(scores.logits, entity, entities))
        if not isinstance(scores, Logits):
            if guidance.schedule is None and choice.is_plain:
                return scores
            raise UserError(
                f"a policy of {type(scores).__name__} is drawn from as it is: without guidance, at "
                "temperature 1, without filters"
            )
        logits = scores.logits / choice.temperature
        if self.filtered and choice.filters:
            # The support of the policy that drew; the gradient is of the logits inside it.
            outside = choice.probs(scores.logits.detach()) == 0
            logits = logits.masked_fill(outside, -torch.inf)
        return Logits(logits)

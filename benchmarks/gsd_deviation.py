"""How far grouped speculative decoding (GSD) moves from the generator's law: total variation, at given settings.

    python benchmarks/gsd_deviation.py [--model EXPORT] [--group-size 14] [--p-threshold 0.15]

One step: a draft of law q is accepted with a(x) and else redrawn from the residual r, so the token's law is exactly
q a + (1 - sum q a) r; its distance from p is averaged over random laws, and with --model over the first 32 passes of
SJD on that generator. Whole images: a table of 3 tokens of 24 codes, 1,000,000 samples, beside what the same estimate
gives for plain sampling (an estimate of a distance is never 0). No distance filter.
"""

import argparse

import torch
from torch import Tensor

from tessellar.parity.table_generator import TableGenerator
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import Acceptance, GroupedRatio, plain_ratio
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import Rules, speculative_jacobi


def one_step(p: Tensor, q: Tensor, rule: Acceptance) -> tuple[float, float]:
    """Acceptance rate under laws p, q [V], and the total variation between the step's law and p."""
    codes = torch.arange(len(p))
    accepted = q * rule(p.expand(len(p), -1), q.expand(len(p), -1), codes)
    residual = (p - q).clamp(min=0)
    rate = accepted.sum()
    law = accepted + (1 - rate) * residual / residual.sum().clamp(min=1e-30)
    return float(rate), float((law - p).abs().sum() / 2)


def over_random_laws(
    rule: Acceptance, codes: int, spread: float, pairs: int = 100
) -> list[tuple[float, float]]:
    stream = torch.Generator().manual_seed(0)
    laws = (spread * torch.randn(pairs, 2, codes, generator=stream)).softmax(-1)
    return [one_step(p, q, rule) for p, q in laws]


def over_a_model(
    rule: Acceptance, path: str, guidance: float, passes: int = 32
) -> list[tuple[float, float]]:
    """At every drafted slot of plain SJD: laws that really meet."""
    model, found = load(path), []
    assert isinstance(model, ImageGenerator)

    def measured(p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
        if len(found) < 15 * passes:
            slots = zip(p.flatten(0, -2), q.flatten(0, -2), strict=True)
            found.extend(one_step(*pair, rule) for pair in slots if float(pair[1].sum()) > 0)
        return plain_ratio(p, q, draft)

    rules, condition = Rules(acceptance=measured), model.class_condition([0, 1, 2, 3])
    arguments = (
        model.generator,
        condition,
        Choice(),
        Noise(range(4)),
        Guidance(Constant(guidance)),
        rules,
    )
    with torch.no_grad():
        speculative_jacobi(*arguments)
    return found


def whole_images(rule: Acceptance | None, rounds: int = 10, batch: int = 100_000) -> float:
    """Estimated total variation between sampled images and their law; `rule` None samples plainly."""
    generator = TableGenerator(sequence_layout(3, Categorical(24)), num_classes=1)
    law, weights = (
        generator.joint(Condition(ids=torch.tensor([0])), Choice())[0],
        24 ** torch.tensor([2, 1, 0]),
    )
    counts = torch.zeros(len(law), dtype=torch.int64)
    condition = Condition(ids=torch.zeros(batch, dtype=torch.int64))
    for number in range(rounds):
        noise = Noise(range(number * batch, (number + 1) * batch))
        if rule is None:
            tokens = Ancestral()(generator, condition, Sampling(), noise)
        else:
            rules = Rules(4, acceptance=rule)
            tokens = speculative_jacobi(generator, condition, Choice(), noise, NO_GUIDANCE, rules)
        counts += torch.bincount((tokens * weights).sum(1), minlength=len(law))
    return float((counts / counts.sum() - law).abs().sum() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="export of a class-conditional generator")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--group-size", type=int, default=14)
    parser.add_argument("--p-threshold", type=float, default=0.15)
    arguments = parser.parse_args()
    rule = GroupedRatio(arguments.group_size, arguments.p_threshold)
    cases = {f"random laws, {v} codes, spread {s}": (v, s) for v in (64, 512) for s in (1.5, 3.0)}
    for name, (codes, spread) in cases.items():
        _show(
            name,
            over_random_laws(plain_ratio, codes, spread),
            over_random_laws(rule, codes, spread),
        )
    if arguments.model:
        pairs = [over_a_model(r, arguments.model, arguments.guidance) for r in (plain_ratio, rule)]
        _show(arguments.model, *pairs)
    print(
        f"whole images: TV {whole_images(rule):.3f}; plain sampling, the same estimate: {whole_images(None):.3f}"
    )


def _show(name: str, plain: list[tuple[float, float]], grouped: list[tuple[float, float]]) -> None:
    rates, distances = (torch.tensor(grouped).T[i] for i in (0, 1))
    before = torch.tensor(plain).T[0]
    print(
        f"{name}: acceptance {before.mean():.2f} -> {rates.mean():.2f}, "
        f"TV of a step {distances.mean():.3f} (largest {distances.max():.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()

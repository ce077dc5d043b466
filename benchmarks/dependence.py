"""How much a token's law depends on the few tokens before it: what limits exact speculative decoding of a model.

    python benchmarks/dependence.py MODEL [--guidance 1.25] [--temperature 1] [--images 40] [--bf16] [--out FILE]

A draft of token i was drawn while the k tokens before it were drafts too. Here those k tokens of a sample are drawn
anew, and the law of token i before and after is compared: its overlap, the sum over codes of min(p, p'), is the largest
probability with which any exact rule can keep a draft of p' as a draw of p (arXiv 2211.17192). Means over images and
places, and the entropy of the laws beside them, which by itself limits nothing.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral, decode_from
from tessellar.sampling.settings import Sampling

REDRAWN = (1, 2, 4, 8)


class Probe:
    """A generator, conditions and sampling settings."""

    def __init__(
        self, model: ImageGenerator, condition: Condition, guidance: Guidance, choice: Choice
    ) -> None:
        self.generator, self.condition = model.generator, condition
        self.guidance, self.choice = guidance, choice

    def law(self, tokens: Tensor, entity: int, redrawn: int, noise: Noise) -> Tensor:
        """Law [B, ..., V] of an entity, given `tokens` [B, N] of which the `redrawn` entities before it are new."""
        state = self.generator.start(self.condition, self.guidance)
        steps = list(
            decode_from(
                self.generator,
                state,
                Sampling(choice=self.choice),
                noise,
                tokens,
                entity - redrawn,
                entity + 1,
            )
        )
        assert isinstance(steps[-1].distribution, Logits)
        return self.choice.probs(steps[-1].distribution.logits)

    def overlaps(self, images: int) -> tuple[float, dict[int, float]]:
        """Entropy in nats, and the overlap by the number of tokens drawn anew."""
        tokens = Ancestral()(
            self.generator,
            self.condition,
            Sampling(choice=self.choice),
            Noise(range(images)),
            self.guidance,
        )
        again = Noise(range(images, 2 * images))
        entropy, found = [], {k: [] for k in REDRAWN}
        for entity in range(max(REDRAWN), self.generator.entities.count):
            law = self.law(tokens, entity, 0, again)
            entropy.append(float(torch.special.entr(law).sum(-1).mean()))
            for k in REDRAWN:
                other = self.law(tokens, entity, k, again)
                found[k].append(float(torch.minimum(law, other).sum(-1).mean()))
        return mean(entropy), {k: mean(values) for k, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "model", help="export of a class-conditional generator of categorical tokens"
    )
    parser.add_argument("--guidance", type=float, default=1.25)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file to write, too")
    arguments = parser.parse_args()
    model = load(arguments.model)
    if not isinstance(model, ImageGenerator):
        raise UserError(f"{arguments.model} is a tokenizer; a generator is needed")
    condition = model.class_condition([i % 10 for i in range(arguments.images)])
    probe = Probe(
        model, condition, Constant(arguments.guidance).guidance(), Choice(arguments.temperature)
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
        entropy, overlaps = probe.overlaps(arguments.images)
    print(f"entropy of a token {entropy:.2f} nats")
    for k, overlap in overlaps.items():
        print(f"overlap after {k} tokens drawn anew: {overlap:.3f}")
    if arguments.out is not None:
        facts = {"images": arguments.images, "guidance": arguments.guidance}
        found = {"entropy": entropy, "overlaps": overlaps, **facts}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

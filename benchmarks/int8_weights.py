"""What rounding a generator's matrices to 8 bits changes: tokens of the same seeds, and the likeliest code at a place.

    python benchmarks/int8_weights.py EXPORT [--count 50] [--json FILE]

`same_tokens`: the share of places at which an image of a seed has the same token with int8 weights (one other token
makes all behind it other ones). `same_until`: places before the first other token, of all. `same_likeliest`: the share
of places at which both weights find the same code the likeliest, behind equal tokens. `nats`: negative log-likelihood
an image of the plainly drawn ones, under both. Distances: `evaluate.py model EXPORT --algorithm.int8 true`; time:
benchmarks/decoding.py --layout int8.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from tessellar.pipeline import ImageGenerator, load_generator
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import NO_GUIDANCE
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.prepare import WeightLayout, prepared
from tessellar.sampling.settings import Sampling


@torch.no_grad()
def laws(model: ImageGenerator, label: int, tokens: Tensor, layout: WeightLayout) -> Tensor:
    """log p [1, N, V] of every token given those before it."""
    generator = model.generator
    found = []
    with prepared(generator, layout=layout):
        state = generator.start(model.class_condition([label]), NO_GUIDANCE)
        for _ in range(generator.layout.length):
            law = generator.predict(state, tokens)
            assert isinstance(law, Logits), f"{type(generator).__name__} predicts no logits"
            found.append(law.logits.float().log_softmax(-1))
    return torch.cat(found, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export")
    parser.add_argument("--count", type=int, default=50, help="images, one at a time")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load_generator(given.export)
    length = model.generator.layout.length
    same = torch.zeros(length)
    until = 0
    likeliest = 0.0
    nats = {"own": 0.0, "int8": 0.0}
    for seed in range(given.count):
        label = seed % (model.num_classes or 1)
        condition = model.class_condition([label])
        plain = model.sample_tokens(condition, Sampling(), [seed])
        rounded = model.sample_tokens(condition, Sampling(algorithm=Ancestral(int8=True)), [seed])
        equal = (plain == rounded)[0]
        same += equal
        until += int(equal.long().cumprod(0).sum())
        own = laws(model, label, plain, "auto")
        other = laws(model, label, plain, "int8")
        likeliest += float((own.argmax(-1) == other.argmax(-1)).float().mean())
        for name, law in (("own", own), ("int8", other)):
            nats[name] -= float(law.gather(-1, plain[..., None]).sum())
    row = {
        "export": Path(given.export).name,
        "images": given.count,
        "same_tokens": float(same.mean()) / given.count,
        "same_until": until / given.count / length,
        "same_likeliest": likeliest / given.count,
        "nats": nats["own"] / given.count,
        "nats_int8": nats["int8"] / given.count,
    }
    print(json.dumps(row, indent=1))
    if given.json:
        given.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""MaskGIT's own promises: its loss, the plan of its steps, what decoding keeps. (The rest: test_protocol.py.)"""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.maskgit import MaskGIT, maskgit_uvit, maskgit_vit
from tessellar.models.maskgit.official import from_official, to_official
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant, Guidance
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling import confidence
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.confidence import planned_sizes
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import GroupedJacobi, SpeculativeJacobi

LINE = sequence_layout(12, Categorical(9))
LABELS = Condition(ids=torch.tensor([0, 3, 1]))


def model(backbone: Any = "vit", scale: float = 0.3) -> MaskGIT:
    torch.manual_seed(0)
    generator = MaskGIT(LINE, backbone, 32, 4, 4, 64, 4, condition_dropout=0.0, dropout=0.0)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return generator.eval()


def tokens_of(seed: int = 0) -> Tensor:
    return torch.randint(0, 9, (3, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backbone", ["vit", "uvit"])
@torch.no_grad()
def test_masked_tokens_are_not_looked_at(backbone: str) -> None:
    generator, tokens, masked = (
        model(backbone),
        tokens_of(),
        torch.arange(12).expand(3, -1) % 3 == 0,
    )
    other = torch.where(masked, tokens_of(1), tokens)
    before = generator.logits(tokens, masked, LABELS)
    torch.testing.assert_close(before, generator.logits(other, masked, LABELS))
    changed = torch.where(masked, tokens, (tokens + 1) % 9)
    assert not torch.allclose(before, generator.logits(changed, masked, LABELS))


@torch.no_grad()
def test_loss_of_a_generator_that_knows_nothing_is_the_entropy_of_the_vocabulary() -> None:
    generator = model(scale=0.0)
    assert float(generator.loss(tokens_of(), LABELS)["cross_entropy"]) == pytest.approx(
        log(9), abs=1e-5
    )


@torch.no_grad()
def test_weights_of_known_tokens_and_samples() -> None:
    generator, tokens = model(), tokens_of()
    masked = torch.zeros(3, 12, dtype=torch.bool)
    masked[:, :4] = True
    losses = torch.nn.functional.cross_entropy(
        generator.logits(tokens, masked, LABELS).transpose(1, 2),
        tokens,
        reduction="none",
        label_smoothing=0.1,
    )
    expected = (losses[1, :4].sum() + 0.1 * losses[1, 4:].sum()) / (4 + 0.1 * 8)
    given = generator.masked_loss(tokens, masked, LABELS, torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(given, expected)


def test_accuracy_is_of_each_sample_then_of_all() -> None:
    """One of one masked tokens is right in the first sample, none of three in the second: a half, not a quarter."""
    generator = model()
    condition = Condition(ids=torch.tensor([0, 1]))
    tokens = tokens_of()[:2].clone()
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    masked[0, :1] = True
    masked[1, :3] = True
    likely = generator.logits(tokens, masked, condition).argmax(-1)
    tokens[0, :1] = likely[0, :1]
    tokens[1, :3] = (likely[1, :3] + 1) % generator.vocab
    assert generator.masked_accuracy(tokens, masked, condition) == 0.5


@pytest.mark.parametrize(
    ("length", "steps"), [(32, 8), (64, 8), (128, 64), (12, 1), (12, 6), (256, 16)]
)
def test_every_step_makes_some_token_known(length: int, steps: int) -> None:
    sizes = planned_sizes(length, steps)
    assert len(sizes) == steps and min(sizes) >= 1 and sum(sizes) == length


def test_first_steps_are_small() -> None:
    assert planned_sizes(32, 8) == (
        3,
        3,
        2,
        3,
        3,
        4,
        4,
        10,
    )  # floor(32 arccos(n / 8) 2 / pi): 29, 26, 24, ..


@torch.no_grad()
def test_the_highest_confidence_comes_first_and_is_kept() -> None:
    """Without noise each kept token is the argmax of the step at which it was the surest of the unknown ones."""
    generator, sizes = model(), planned_sizes(12, 4)
    final = confidence.MaskGIT(4, 0.0, anneal=False)(
        generator, LABELS, Sampling(), Noise([0, 1, 2])
    )
    known = torch.zeros(3, 12, dtype=torch.bool)
    for size in sizes:
        logits = generator.logits(final, ~known, LABELS)
        best = logits.max(-1)
        surest = best.values.masked_fill(known, -torch.inf).topk(size).indices
        assert torch.equal(best.indices.gather(1, surest), final.gather(1, surest))
        known.scatter_(1, surest, True)


@torch.no_grad()
def test_an_image_depends_on_its_own_seed() -> None:
    generator, guidance = model(), Guidance(Constant(2.0))
    algorithm = confidence.MaskGIT(4, 2.0)
    together = algorithm(generator, LABELS, Sampling(), Noise([5, 6, 7]), guidance)
    alone = algorithm(generator, LABELS.select(torch.tensor([1])), Sampling(), Noise([6]), guidance)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(
        together, algorithm(generator, LABELS, Sampling(), Noise([8, 9, 10]), guidance)
    )


def test_through_settings() -> None:
    algorithm = confidence.MaskGIT(3, 1.5)
    sampling = Sampling(algorithm=algorithm)
    tokens = sampling.tokens(model(), LABELS, [0, 1, 2])
    assert torch.equal(tokens, algorithm(model(), LABELS, sampling, Noise([0, 1, 2])))
    assert sampling.describe()["algorithm"]["init_args"]["temperature"] == 1.5


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (confidence.MaskGIT(13), "13 steps for 12 tokens; give 1 to 12"),
        (SpeculativeJacobi(), "MaskGIT does not predict in order"),
        (GroupedJacobi(d_threshold=None), "MaskGIT does not predict in order"),
    ],
)
def test_impossible_settings(algorithm: Algorithm, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(algorithm=algorithm).tokens(model(), LABELS, [0, 1, 2])


def test_other_generators_and_other_temperatures_are_refused() -> None:
    in_order = LlamaGen(LINE, 32, 1, 4, 4)
    with pytest.raises(UserError, match="needs a masked generator; LlamaGen predicts in order"):
        Sampling(algorithm=confidence.MaskGIT()).tokens(in_order, LABELS, [0, 1, 2])
    with pytest.raises(UserError, match="has a temperature of its own"):
        Sampling(choice=Choice(temperature=0.5), algorithm=confidence.MaskGIT()).tokens(
            model(), LABELS, [0, 1, 2]
        )


@pytest.mark.parametrize(
    ("preset", "length", "count"),
    [
        (maskgit_vit, 32, 177_202_432),
        (maskgit_vit, 64, 177_227_008),
        (maskgit_uvit, 128, 294_990_848),
    ],
)
def test_published_sizes(preset: Any, length: int, count: int) -> None:
    with torch.device("meta"):
        generator = preset(sequence_layout(length, Categorical(4096)))
    assert sum(p.numel() for p in generator.parameters()) == count


@pytest.mark.parametrize("backbone", ["vit", "uvit"])
def test_official_keys_there_and_back(backbone: str) -> None:
    generator = model(backbone)
    again = from_official(to_official(generator), LINE, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), generator.parameters(), strict=True)
    )
    with pytest.raises(UserError, match="is for 12 tokens, but the tokenizer gives 5"):
        from_official(to_official(generator), sequence_layout(5, Categorical(9)), 4)

"""reAR's two parts: a noisy context with true targets, and recovery of code vectors; both in training alone."""

from functools import partial

import pytest
import torch

from tessellar.errors import UserError
from tessellar.models.har import HAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.maskgit import MaskGIT
from tessellar.models.next_entity import NextEntity
from tessellar.models.rar import RAR
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout, sequence_layout
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.methods.context_noise import ContextNoise, reading
from tessellar.training.methods.recovery import EmbeddingRecovery, Recovery, Trace

GRID = grid_layout(4, 4, Categorical(16))
GENERATORS = {
    "llamagen": lambda: LlamaGen(GRID, 32, 2, 4, 5, ffn_multiple_of=8, dropout=0.0),
    "rar": lambda: RAR(GRID, 32, 2, 4, 64, 5, dropout=0.0),
    "har": lambda: HAR(
        sequence_layout(16, Categorical(16)), 32, 2, 4, 5, dropout=0.0, ffn_multiple_of=8
    ),
    "next-cell": lambda: NextEntity(GRID, "cell:2", 32, 2, 4, 5, dropout=0.0, ffn_multiple_of=8),
    "next-random": lambda: NextEntity(
        GRID, "random:0", 32, 2, 4, 5, random_order=1.0, dropout=0.0, ffn_multiple_of=8
    ),
}
every_generator = pytest.mark.parametrize("name", GENERATORS)


def make(name: str):
    torch.manual_seed(0)
    generator = GENERATORS[name]().train()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator.conditioning.dropout = 0.0
    return generator


def tokenizer() -> ViTVQ:
    torch.manual_seed(0)
    made = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2)
    torch.nn.init.normal_(next(made.quantizer.parameters()))
    return made


def test_rears_schedule_ends_at_three_quarters() -> None:
    noise = ContextNoise()
    assert [noise.rate_at(t) for t in (0.0, 0.375, 0.75, 1.0)] == pytest.approx(
        [1.0, 0.5, 0.0, 0.0]
    )
    assert ContextNoise(0.25, decay="constant").rate_at(0.9) == 0.25
    assert ContextNoise(0.4, 1.0, "cosine").rate_at(0.5) == pytest.approx(0.2)


def test_replaced_tokens_have_the_rate_and_the_vocabulary_of_their_place() -> None:
    layout = Layout((Segment((8,), Categorical(3), "a"), Segment((8,), Categorical(50), "b")))
    torch.manual_seed(0)
    tokens = torch.zeros(4000, 16, dtype=torch.int64)
    fixed = ContextNoise(0.5, decay="constant", uniform=False).corrupt(tokens, layout, 0.0)
    layout.check(fixed)
    changed = (fixed != 0).float()
    assert float(changed[:, :8].mean()) == pytest.approx(0.5 * 2 / 3, abs=0.01)
    assert float(changed[:, 8:].mean()) == pytest.approx(0.5 * 49 / 50, abs=0.01)
    drawn = (
        (ContextNoise(decay="constant").corrupt(tokens, layout, 0.0)[:, 8:] != 0).float().mean(1)
    )
    assert float(drawn.mean()) == pytest.approx(0.49, abs=0.02) and float(drawn.std()) > 0.25


def test_without_noise_left_nothing_is_drawn() -> None:
    tokens, before = torch.zeros(2, 16, dtype=torch.int64), torch.get_rng_state()
    assert ContextNoise().corrupt(tokens, GRID, 0.8) is tokens
    assert torch.equal(before, torch.get_rng_state())


@every_generator
def test_the_context_is_noisy_and_the_targets_are_true(name: str) -> None:
    """Reading other tokens changes the loss; it is that of the other tokens' predictions on the true targets."""
    generator = make(name)
    tokens, other = torch.randint(0, 16, (2, 2, 16))
    condition = Condition(ids=torch.tensor([0, 1]))

    def loss(tokens: torch.Tensor) -> float:
        torch.manual_seed(1)
        return float(generator.loss(tokens, condition)["cross_entropy"].detach())

    with reading(generator, lambda tokens, entities: other):
        noisy = loss(tokens)
    torch.manual_seed(1)
    entities = generator.training_order(2)
    scores = generator.score(other, condition, entities)
    targets = tokens.gather(1, entities.order.expand(2, -1))
    assert noisy == pytest.approx(float(scores.cross_entropy(targets).detach()), rel=1e-4)
    assert noisy != pytest.approx(loss(tokens), rel=1e-3) and noisy != pytest.approx(
        loss(other), rel=1e-3
    )


@every_generator
def test_rows_of_recovery_hold_their_tokens(name: str) -> None:
    """The first block's input at the rows said to read a token changes with that token and with no other."""
    generator, tokens = make(name), torch.randint(0, 16, (1, 16))
    traces = [Trace(), Trace()]
    recovery = EmbeddingRecovery(Recovery(hidden=8), generator, tokenizer())
    entities = generator.entities
    rows, ranks = generator.context_rows(entities)
    assert len(rows) >= 7
    for row, rank in list(zip(rows.tolist(), ranks.tolist(), strict=True))[
        :: max(1, len(rows) // 3)
    ]:
        changed = tokens.clone()
        changed[0, entities.order[rank]] = (changed[0, entities.order[rank]] + 1) % 16
        for i, read in enumerate((tokens, changed)):
            with recovery.watch(generator) as traces[i]:
                generator.score(read, Condition(ids=torch.tensor([0])), entities)
        differs = (traces[0].states[0] != traces[1].states[0]).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == [len(differs) + row]
    assert not generator.layers[0]._forward_pre_hooks and not generator.layers[1]._forward_hooks


@every_generator
def test_recovery_is_learnt_and_reaches_the_generator(name: str) -> None:
    generator, made = make(name), tokenizer()
    recovery = EmbeddingRecovery(Recovery(hidden=32), generator, made)
    optimizer = torch.optim.Adam([*generator.parameters(), *recovery.parameters()], lr=1e-2)
    tokens, losses = torch.randint(0, 16, (4, 16)), []
    for _ in range(25):
        with recovery.watch(generator) as trace, reading(generator, partial(note, trace)):
            generator.loss(tokens, Condition(ids=torch.arange(4)))
        losses.append(recovery(trace, generator, tokens, made))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert bool(next(generator.layers.parameters()).grad.any())
    assert float(losses[-1].detach()) < 0.6 * float(losses[0].detach())
    assert next(made.quantizer.parameters()).grad is None


def note(trace: Trace, tokens: torch.Tensor, entities) -> torch.Tensor:
    trace.entities = entities
    return tokens


def test_a_run_with_both_logs_recovery_in_training_alone(fit, make_module) -> None:
    module = make_module(context_noise=ContextNoise(), recovery=Recovery(hidden=8))
    before = [p.detach().clone() for p in module.recovery.parameters()]
    logged: dict[str, set[str]] = {"train": set(), "val": set()}
    module.log_terms = lambda stage, terms, size: logged[stage].update(terms)
    _, losses = fit(module, 3, limit_val_batches=1, val_check_interval=3)
    assert logged["train"] == {"loss", "cross_entropy", "recovery"}
    assert logged["val"] == {"loss", "cross_entropy", "nats_per_image"}
    assert all(
        not torch.equal(a, b) for a, b in zip(before, module.recovery.parameters(), strict=True)
    )
    assert module.model.generator.reader is None and len(losses) == 3


def test_noise_changes_a_run_and_none_is_the_run_without(fit, make_module) -> None:
    plain, still, noisy = (
        fit(make_module(context_noise=noise), 2)[1]
        for noise in (None, ContextNoise(0.0), ContextNoise())
    )
    assert plain == still != noisy


@pytest.fixture
def make_module():
    def module(**options) -> GeneratorModule:
        torch.manual_seed(0)
        generator = partial(
            LlamaGen, width=16, depth=2, num_heads=2, num_classes=10, ffn_multiple_of=8, dropout=0.0
        )
        made = generator if "generator" not in options else options.pop("generator")
        return GeneratorModule(tokenizer(), made, **options)

    return module


def test_generators_without_teacher_forcing_are_refused(make_module) -> None:
    masked = partial(MaskGIT, width=16, depth=1, num_heads=2, hidden=24, num_classes=5)
    for option in ({"context_noise": ContextNoise()}, {"recovery": Recovery()}):
        with pytest.raises(UserError, match="teacher forcing"):
            make_module(generator=masked, **option)


def test_what_recovery_cannot_align_is_refused(make_module) -> None:
    with pytest.raises(UserError, match="layers 0 and 9"):
        make_module(recovery=Recovery(deep=9))
    with pytest.raises(UserError, match="0 <= rate <= 1"):
        ContextNoise(1.5)

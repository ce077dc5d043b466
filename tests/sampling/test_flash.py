"""FLASH: exact whatever the drafter, as fast as it is right; trained by the training module against a frozen export."""

from functools import partial

import pytest
import torch

from tessellar.errors import UserError
from tessellar.models.flash import FlashDrafter
from tessellar.models.llamagen import LlamaGen
from tessellar.models.rar import RAR
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import Constant
from tessellar.protocol.layout import Categorical, Layout, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling import flash
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.flash import FlashDrafts, flash_drafts
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling

GRID = grid_layout(2, 2, Categorical(3))
LABELS = Condition(ids=torch.tensor([0, 3, 1]))


def shaken(layout: Layout = GRID, seed: int = 0) -> LlamaGen:
    torch.manual_seed(seed)
    made = LlamaGen(layout, 16, 1, 2, num_classes=5, ffn_multiple_of=8)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def drafter(target: LlamaGen, drafts: int = 2, **options: float) -> FlashDrafter:
    torch.manual_seed(1)
    made = FlashDrafter(
        target.layout,
        16,
        1,
        2,
        5,
        drafts,
        ffn_multiple_of=8,
        **options,  # type: ignore[arg-type]
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.learn_from(target)
    return made.eval()


@torch.no_grad()
def test_whole_images_follow_the_law_of_the_generator(shared_noise, fits, histogram) -> None:
    """81 images of a tiny generator whose law is known; one false alarm in a million (conftest.py)."""
    target = shaken()
    table = TableGenerator(GRID, num_classes=1)
    images = table.outcomes()
    choice = Choice(1.2, top_p=0.95)
    rule = Constant(1.5).guidance()
    state = target.start(Condition(ids=torch.full((81,), 3)), rule)
    scores = target.predict(state, images, 4)
    assert isinstance(scores, Logits)
    law = choice.probs(scores.logits).double().gather(-1, images[..., None]).prod(1)[:, 0]
    batch = 20_000
    recorder = Recorder()
    tokens = flash_drafts(
        target,
        drafter(target),
        Condition(ids=torch.full((batch,), 3)),
        choice=choice,
        noise=shared_noise(1, batch),
        guidance=rule,
        recorder=recorder,
    )
    assert fits(histogram(table, tokens), law)
    assert recorder.evaluations < 4 * batch and recorder.draft_evaluations == recorder.evaluations


@torch.no_grad()
def test_greedy_is_plain_greedy_and_an_image_does_not_depend_on_its_batch() -> None:
    target = shaken(grid_layout(3, 4, Categorical(11)))
    own = drafter(target, 4)
    draw = partial(flash_drafts, target, own, guidance=Constant(2.0).guidance())
    plain = Sampling(2.0, Choice(0), Ancestral()).tokens(target, LABELS, [4, 5, 6])
    assert torch.equal(draw(LABELS, choice=Choice(0), noise=Noise([1, 2, 3])), plain)
    together = draw(LABELS, choice=Choice(), noise=Noise([4, 5, 6]))
    for i, seed in enumerate((4, 5, 6)):
        alone = LABELS.select(torch.tensor([i]))
        assert torch.equal(draw(alone, choice=Choice(), noise=Noise([seed]))[0], together[i])


@torch.no_grad()
def test_what_decoding_reads_is_what_training_reads() -> None:
    """Drafts behind each token in one pass are those of windows of which some tokens are kept."""
    target = shaken(grid_layout(3, 4, Categorical(11)))
    own = drafter(target, 3)
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(2))
    hidden = target.score(tokens, LABELS.select(torch.tensor([0, 1]))).hidden
    assert hidden is not None
    order = target.entities.order
    every = own.draft(own.new_cache(2, 12), tokens, hidden, order, torch.tensor([12, 12]))
    cache = own.new_cache(2, 12)
    done = torch.zeros(2, dtype=torch.int64)
    for kept in ([1, 3], [4, 2], [5, 4], [2, 3]):
        index = (done[:, None] + torch.arange(5)).clamp(max=11)
        rows = torch.arange(2)[:, None]
        last = own.draft(cache, tokens[rows, index], hidden[rows, index], order, torch.tensor(kept))
        done = done + torch.tensor(kept)
    torch.testing.assert_close(last, every, atol=1e-4, rtol=1e-4)


def test_losses_are_distances_to_the_generator_s_states_and_laws() -> None:
    target = shaken(grid_layout(2, 3, Categorical(5)))
    own = drafter(target, 2, guidance=1.5, hidden_weight=2.0, soft_weight=0.5)
    tokens = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(2))
    losses = own.loss(tokens, LABELS)
    hidden, laws = own.taught(tokens, LABELS)
    surprise = torch.zeros(3)
    count = 0
    for length in range(1, 6):
        index = torch.full((3,), length)
        cache = own.new_cache(3, 6)
        read = (tokens[:, :length], hidden[:, :length])
        with torch.no_grad():
            logits = own.draft(cache, *read, target.entities.order, index)
        for ahead in range(min(2, 6 - length)):
            q = logits[:, ahead].log_softmax(-1)
            surprise -= (laws[:, length + ahead].exp() * q).sum(-1)
            count += 1
    torch.testing.assert_close(
        losses["soft"].detach(), 0.5 * surprise.mean() / count, atol=1e-5, rtol=1e-4
    )
    assert float(losses["hidden"].detach()) > 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in own.named_parameters():
        assert (parameter.grad is None) == (name == "output.weight"), name
    weighed = own.loss(tokens, LABELS, torch.tensor([0.0, 1.0, 0.0]))
    one = own.loss(tokens[1:2], LABELS.select(torch.tensor([1])))
    torch.testing.assert_close(weighed["hidden"], one["hidden"])


def test_what_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    target = shaken()
    own = FlashDrafter(GRID, 16, 1, 2, 5, 2, ffn_multiple_of=8)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="give its export as --model.target"):
        own.loss(tokens, Condition(ids=torch.tensor([0])))
    with pytest.raises(
        UserError, match="generates nothing by itself: sample .* --algorithm FlashDrafts"
    ):
        own.start(LABELS)
    with pytest.raises(
        UserError, match="the drafter has width 32 and 3 codes, LlamaGen has 16 and 3"
    ):
        FlashDrafter(GRID, 32, 1, 2, 5).learn_from(target)
    with pytest.raises(UserError, match="one linear output layer; RAR has none"):
        own.learn_from(RAR(GRID, 16, 1, 2, 24, 5))
    with pytest.raises(UserError, match="LlamaGen learns from tokens alone: leave target out"):
        target.learn_from(target)
    other = shaken(grid_layout(3, 2, Categorical(3)))
    monkeypatch.setattr(flash, "load_drafter", lambda path: own)
    with pytest.raises(UserError, match="the drafter was built for"):
        Sampling(algorithm=FlashDrafts("x")).tokens(other, LABELS, [1, 2, 3])
    with pytest.raises(UserError, match="gives no hidden state"):
        Sampling(algorithm=FlashDrafts("x")).tokens(TableGenerator(GRID), LABELS, [1, 2, 3])

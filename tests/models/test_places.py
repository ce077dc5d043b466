"""Windows of places: several fronts read what a full pass reads in which each input sees what was there."""

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache, Slots
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Linear
from tests.models.test_protocol import GENERATORS, GUIDANCES, labels, make, tokens_of

WITH_PLACES = ("llamagen", "llamagen-1d", "ibq", "hita", "retok", "rar", "rar-1d", "flextok-ar")
MASKED = ("maskgit", "maskgit-uvit", "mar")
OTHERS = ("tokenbridge",)


def front(name: str) -> PrefixTransformer:
    generator = make(name)
    assert isinstance(generator, PrefixTransformer)
    return generator


def logits(distribution: object) -> Tensor:
    assert isinstance(distribution, Logits)
    return distribution.logits


def seen_at(generator: PrefixTransformer, when: Tensor, tokens: Tensor, rule: Guidance) -> Tensor:
    """Logits [B, N, V] of one full pass in which input k is seen by later inputs that were read no earlier than it."""
    batch = len(tokens)
    state = generator.start(labels(batch), rule)
    assert state.prefix is not None
    prefix = state.prefix.length
    ranks = generator.entities.inverse
    order = torch.full((prefix - 1 + len(when),), -1)
    order[prefix - 1 :] = when[generator.entities.order]
    place = torch.arange(len(order))
    mask = (place[None] <= place[:, None]) & (order[None] <= order[:, None])
    state.cache = NoCache(tokens.device)
    slots = Slots(place[None], 0, len(place), mask[None, None], False)
    hidden = generator.norm(generator._run(state, place[None], tokens, slots))[:, prefix - 1 :]
    rank = torch.arange(len(when)).expand(batch, -1)
    return logits(generator.head_at(state, hidden, rank))[:, ranks]


@pytest.mark.parametrize("name", WITH_PLACES)
@pytest.mark.parametrize("guidance", GUIDANCES)
@torch.no_grad()
def test_fronts_in_step_see_what_was_there_when_they_read(name: str, guidance: str) -> None:
    """Two halves of the image advance at once, the second from another place of its own; windows are in no order."""
    generator = front(name)
    tokens = tokens_of(generator.layout, 2)
    length = generator.layout.length
    half = length // 2
    state = generator.start_places(labels(2), GUIDANCES[guidance])
    when = torch.empty(length, dtype=torch.int64)
    found = torch.empty(0)
    for step in range(length - half):
        window = [place for place in (half + step, step) if place < (length, half)[place < half]]
        places = torch.tensor(window).expand(2, -1)
        when[places[0]] = step
        predicted = logits(generator.predict_places(state, tokens, places))
        state.keep_places(torch.ones_like(places, dtype=torch.bool))
        if not len(found):
            found = torch.empty(2, length, predicted.shape[-1])
        found[:, places[0]] = predicted
    expected = seen_at(generator, when, tokens, GUIDANCES[guidance])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_PLACES)
@torch.no_grad()
def test_places_in_order_are_the_entities(name: str) -> None:
    generator = front(name)
    tokens = tokens_of(generator.layout, 2)
    guidance = GUIDANCES["guided"]
    count = generator.entities.count
    expected = logits(generator.predict(generator.start(labels(2), guidance), tokens, count, count))
    state = generator.start_places(labels(2), guidance)
    cut = count // 3
    parts = []
    for places in (generator.entities.order[:cut], generator.entities.order[cut:]):
        window = places.expand(2, -1)
        parts.append(logits(generator.predict_places(state, tokens, window)))
        state.keep_places(torch.ones_like(window, dtype=torch.bool))
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_drafts_of_a_front_are_hidden_from_the_others_until_they_are_kept() -> None:
    """Row-parallel drafts: each row sees final inputs of all rows before it, and its own drafts."""
    generator = front("llamagen")
    tokens = tokens_of(generator.layout, 1)
    state = generator.start_places(labels(1))
    first = torch.arange(6)[None]
    generator.predict_places(state, tokens, first)
    state.keep_places(torch.ones_like(first, dtype=torch.bool))
    # Row 1 stands at place 6, row 2 at place 8: the first input of each row is final.
    places = torch.tensor([[6, 7, 8, 9]])
    groups = torch.tensor([[0, 1, 0, 2]])
    other = tokens.clone()
    other[0, 6] = (tokens[0, 6] + 1) % 23  # the draft that place 7 reads
    ahead = state.select(torch.tensor([0]))
    before = logits(generator.predict_places(state, tokens, places, groups))
    after = logits(generator.predict_places(ahead, other, places, groups))
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])
    state.keep_places(torch.tensor([[True, True, True, False]]))
    ahead.keep_places(torch.tensor([[True, False, True, False]]))
    last = torch.tensor([[9]])
    assert not torch.allclose(
        logits(generator.predict_places(state, tokens, last)),
        logits(generator.predict_places(ahead, tokens, last)),
    )


@torch.no_grad()
def test_images_stand_at_fronts_of_their_own() -> None:
    """Padding is seen by nobody; an image is the same alone."""
    generator = front("llamagen")
    tokens = tokens_of(generator.layout, 2)
    rule = Guidance(Linear(3.0, start=1.5))
    windows = [
        torch.tensor([[0, 1, 2], [0, -1, -1]]),
        torch.tensor([[4, 3, -1], [-1, 2, 1]]),
        torch.tensor([[8, 5, 6], [3, 8, -1]]),
    ]
    together = generator.start_places(labels(2), rule)
    alone = [generator.start_places(labels(2).select(torch.tensor([i])), rule) for i in range(2)]
    for window in windows:
        found = logits(generator.predict_places(together, tokens, window))
        together.keep_places(torch.ones_like(window, dtype=torch.bool))
        for i, state in enumerate(alone):
            chosen = window[i : i + 1, window[i] >= 0]
            expected = logits(generator.predict_places(state, tokens[i : i + 1], chosen))
            state.keep_places(torch.ones_like(chosen, dtype=torch.bool))
            torch.testing.assert_close(found[i, window[i] >= 0], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_masks_are_filled_at_any_places(name: str) -> None:
    """Generators without a cache: the tokens at chosen places are those of predicting all that is unknown."""
    generator = make(name)
    tokens = tokens_of(generator.layout, 2)
    state = generator.start_places(labels(2), GUIDANCES["guided"])
    generator.predict(state, tokens)
    entities = state.entities
    places = entities.order[entities.ends[1] :].expand(2, -1).flip(1)
    chosen = generator.predict_places(state, tokens, places[:, 1:])
    everything = generator.predict_rest(state, tokens)  # type: ignore[attr-defined]
    if isinstance(chosen, Logits):
        rows = torch.arange(2)[:, None]
        torch.testing.assert_close(chosen.logits, everything.logits[rows, places[:, 1:]])
        return
    noisy = torch.randn(2, generator.layout.length, 3)
    t = torch.tensor(500)
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(
        chosen.model(noisy[rows, places[:, 1:]], t),
        everything.model(noisy, t)[rows, places[:, 1:]],
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", [name for name in GENERATORS if name not in WITH_PLACES])
def test_who_has_no_such_windows_says_so_in_one_line(name: str) -> None:
    generator = make(name)
    if name.startswith((*MASKED, *OTHERS)):
        return
    with pytest.raises(UserError, match=f"{type(generator).__name__} predicts runs of entities"):
        generator.start_places(labels(1), NO_GUIDANCE)

"""TokenFlow's generator: scales see coarser ones alone, nobody sees padding, scales are drawn again given a draft."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache
from tessellar.models.llamagen import LlamaGen
from tessellar.models.tokenflow import TokenFlowAR, tokenflow_7b
from tessellar.models.tokenflow.official import from_official, to_official
from tessellar.parity.stand_ins import logits_of
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioner, Condition
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Linear
from tessellar.protocol.layout import Categorical, Layout, Segment, grid_layout
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.redrawn import Redrawn
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.tokenflow import TokenFlow
from tessellar.tokenizers.tokenflow.quantizer import SIDES
from tests.tiny.pairs import TOKENIZERS

TEXT = Condition(
    ids=torch.tensor([[0, 0, 1, 5], [1, 6, 7, 8], [0, 1, 9, 2]]),
    valid=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool(),
)
MARKS: dict[str, Any] = {"opening": (3, 4), "closing": (4, 2), "negative": (1, 9, 9)}


def tokenizer() -> TokenFlow:
    torch.manual_seed(1)
    made = TOKENIZERS["TokenFlow"]().eval()
    assert isinstance(made, TokenFlow)
    return made


def model(**options: Any) -> TokenFlowAR:
    reads = tokenizer()
    torch.manual_seed(0)
    text = {"text_vocab": 10, "text_length": 6, "bos": 1, "condition_dropout": 0.0, **MARKS}
    options = text | options
    sizes: dict[str, Any] = {"latent_dim": 5, "ffn_multiple_of": 8}
    made = TokenFlowAR(reads.layout, 32, 2, 4, **sizes, **options).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.bind(reads)
    return made


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 16, (3, 21), generator=torch.Generator().manual_seed(seed))


def scores(made: TokenFlowAR, ids: Tensor, condition: Condition = TEXT) -> Tensor:
    return logits_of(made.score(ids, condition))


@torch.no_grad()
def test_a_scale_depends_on_coarser_ones_alone() -> None:
    made, ids = model(), tokens()
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 16
    before, after = scores(made, ids), scores(made, changed)
    assert before.shape == (3, 21, 16)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert bool((before[:, 5:] != after[:, 5:]).any(-1).all())


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_cached_equals_uncached(guided: bool) -> None:
    made, ids = model(), tokens()
    state, parts = made.start(TEXT, Guidance(Linear(2.5) if guided else None)), []
    for _ in range(3):
        parts.append(logits_of(made.predict(state, ids)))
    plain = scores(made, ids)
    if guided:
        scale = torch.tensor([1.0] + [1.75] * 4 + [2.5] * 16)[:, None]
        null = scores(made, ids, made.null(TEXT))
        plain = null + scale * (plain - null)
    torch.testing.assert_close(torch.cat(parts, 1), plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_is_seen_by_nobody_and_has_places() -> None:
    made, ids = model(), tokens()
    before = scores(made, ids)
    assert made.token_embedding is not None and made.offset == 11
    made.token_embedding.weight[10] += 1.0
    torch.testing.assert_close(scores(made, ids), before, rtol=0, atol=0)
    # The same texts behind more padding of their own are the same condition.
    assert TEXT.ids is not None and TEXT.valid is not None
    wider = Condition(
        ids=torch.nn.functional.pad(TEXT.ids, (2, 0)),
        valid=torch.nn.functional.pad(TEXT.valid, (2, 0)),
    )
    assert torch.equal(scores(made, ids, wider), before)
    # Codes are looked up in the codebooks, not in the table of ids.
    made.token_embedding.weight[made.offset :] += 1.0
    assert torch.equal(scores(made, ids), before)


@torch.no_grad()
def test_norms_act_on_what_branches_give() -> None:
    made, ids = model(), tokens()
    before = scores(made, ids)
    for layer in made.layers:
        layer.attention.wo.weight *= 3.0  # type: ignore[union-attr, operator]
        layer.feed_forward.w2.weight *= 0.5  # type: ignore[union-attr, operator]
    torch.testing.assert_close(scores(made, ids), before, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def again_without_cache(made: TokenFlowAR, ids: Tensor, condition: Condition, scale: int) -> Tensor:
    """Logits of a scale whose own inputs hold its codes, from one pass over the whole sequence."""
    start, end = int(made.entities.ends[scale]), int(made.entities.ends[scale + 1])
    state = made._state(condition, NO_GUIDANCE, made.entities)
    state.cache = NoCache(ids.device)
    sequence = torch.arange(made.prefix_length + end - 1)[None]
    x = made._inputs(state, sequence, ids)
    place = torch.arange(start, end)[None]
    maps = made.inputs(state, ids, place) + made.own_codes(ids[:, start:end])
    x = torch.cat([x[:, : -(end - start)], made.placed(maps, place)], 1)
    slots = state.cache.reserve(made.visibility(state, sequence))
    hidden = made.through_layers(x, made.shared(sequence, state, slots))
    return torch.nn.functional.linear(
        made.norm(hidden[:, -(end - start) :]), made.output.weight[made.offset :]
    )


@torch.no_grad()
def test_a_scale_is_predicted_again_from_its_draft_and_nothing_else_changes() -> None:
    made, ids = model(), tokens()
    state, plain = made.start(TEXT, Guidance(Linear(2.5))), made.start(TEXT, Guidance(Linear(2.5)))
    with pytest.raises(UserError, match="the first scale is predicted from the text alone"):
        made.predict(state, ids)
        made.predict_again(state, ids)
    made.predict(plain, ids)
    for scale in (1, 2):
        first = logits_of(made.predict(state, ids))
        torch.testing.assert_close(first, logits_of(made.predict(plain, ids)))
        found = logits_of(made.predict_again(state, ids))
        assert not torch.allclose(found, first, atol=1e-2)
        weight = {1: 1.75, 2: 2.5}[scale]
        conditional = again_without_cache(made, ids, TEXT, scale)
        null = again_without_cache(made, ids, made.null(TEXT), scale)
        expected = null + weight * (conditional - null)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits_of(made.predict_again(state, ids)), found)
        assert state.fed.tolist() == [scale + 1] * 3


def test_redrawing() -> None:
    made = model()
    draw = Sampling(Linear(2.5), Choice(top_k=8), Redrawn(()))
    plain = Sampling(Linear(2.5), Choice(top_k=8), Ancestral())
    assert torch.equal(draw.tokens(made, TEXT, [4, 5, 6]), plain.tokens(made, TEXT, [4, 5, 6]))
    twice, recorder = Sampling(Linear(2.5), Choice(top_k=8), Redrawn()), Recorder()
    found = twice.tokens(made, TEXT, [4, 5, 6], recorder)
    report = recorder.report()
    # Three scales, of which two are drawn again.
    assert report.evaluations_per_image == 5 and report.passes == 5
    assert torch.equal(found[:, :1], plain.tokens(made, TEXT, [4, 5, 6])[:, :1])
    assert not torch.equal(found, plain.tokens(made, TEXT, [4, 5, 6]))
    alone = twice.tokens(made, TEXT.select(torch.tensor([1])), [5])
    assert torch.equal(alone[0], found[1])


def test_training_predicts_the_closing_marks_too() -> None:
    made, ids = model(), tokens()
    hidden = made.hidden_states(ids, TEXT)
    assert hidden.shape == (3, 21 + 2, 32)
    logits = made.output(hidden)
    targets = torch.cat([ids + 11, torch.tensor([4, 2]).expand(3, -1)], 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(made.loss(ids, TEXT)["cross_entropy"], expected)
    # The mark that closes is read where the next one is predicted; nothing of it comes before.
    other = model(closing=(5, 2))
    shifted = other.hidden_states(ids, TEXT)
    assert torch.equal(shifted[:, :22], hidden[:, :22])
    assert not torch.equal(shifted[:, 22:], hidden[:, 22:])


def test_training_reaches_every_parameter() -> None:
    for made, condition in (
        (model(), TEXT),
        (model(num_classes=3, text_vocab=None), Condition(ids=torch.arange(3))),
    ):
        made.train().loss(tokens(), condition)["cross_entropy"].backward()
        names = {n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())}
        assert names == set()


def test_dropped_captions_are_empty_and_guidance_moves_away_from_the_negative_text() -> None:
    made = model(condition_dropout=1.0)
    dropped, null = made.train().drop_condition(TEXT), made.null(TEXT)
    assert dropped.ids is not None and dropped.valid is not None and null.ids is not None
    assert [row[mask].tolist() for row, mask in zip(dropped.ids, dropped.valid, strict=True)] == [
        [1]
    ] * 3
    assert null.ids.tolist() == [[1, 9, 9]] * 3
    empty = model(negative=()).null(TEXT)
    assert empty.ids is not None and empty.ids.tolist() == [[1]] * 3


def test_a_picture_is_drawn_from_a_class_with_any_pyramid() -> None:
    for name, latent_dim in (("TokenFlow", 5), ("VAR's VQVAE", 4)):
        reads = TOKENIZERS[name]().eval()
        made = TokenFlowAR(reads.layout, 32, 1, 4, 3, latent_dim=latent_dim, ffn_multiple_of=8)
        whole = ImageGenerator(reads, made.eval(), ClassConditioner(3))
        images = whole.sample(Condition(ids=torch.tensor([0, 2])), Sampling(), [0, 1])
        assert images.shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="VARVQVAE does not say what codes add at their own scale"):
        Sampling(algorithm=Redrawn()).tokens(made, Condition(ids=torch.tensor([0])), [0])


def test_what_does_not_fit_is_refused() -> None:
    layout = tokenizer().layout
    with pytest.raises(UserError, match="needs either num_classes or text_vocab"):
        TokenFlowAR(layout, 32, 1, 4)
    with pytest.raises(
        UserError, match="scales need a layout of grids, or of sequences, from coarse to fine"
    ):
        TokenFlowAR(grid_layout(4, 4, Categorical(9)), 32, 1, 4, 3)
    with pytest.raises(UserError, match="begins with one token"):
        scales = tuple(Segment((side, side), Categorical(9), f"scale{side}") for side in (2, 4))
        TokenFlowAR(Layout(scales), 32, 1, 4, 3)
    with pytest.raises(UserError, match="the id 10 is none of the 10 text ids"):
        model(opening=(10,))
    with pytest.raises(UserError, match="the negative text has 7 ids, texts at most 6"):
        model(negative=(1,) * 7)
    with pytest.raises(UserError, match="captions have 7 ids; this model reads 6"):
        model().score(
            tokens(), Condition(ids=torch.ones(3, 7).long(), valid=torch.ones(3, 7).bool())
        )
    with pytest.raises(UserError, match="reads captions as token ids"):
        model().score(tokens(), Condition(ids=torch.ones(3, 7).long()))
    with pytest.raises(UserError, match="built for inputs of 40 channels, the tokenizer has 5"):
        TokenFlowAR(layout, 32, 1, 4, 3).bind(tokenizer())
    with pytest.raises(UserError, match="TokenFlowAR has no tokenizer yet"):
        TokenFlowAR(layout, 32, 1, 4, 3).score(tokens(), Condition(ids=torch.arange(3)))
    other = LlamaGen(grid_layout(2, 2, Categorical(5)), 16, 1, 2, 3)
    with pytest.raises(UserError, match="LlamaGen reads no draft"):
        other.predict_again(other.start(Condition(ids=torch.arange(3))), torch.zeros(3, 4).long())


def test_a_plain_llama_is_no_generator_of_tokenflow() -> None:
    made = model()
    state = to_official(made)
    plain = {name: t for name, t in state.items() if "qknorm" not in name}
    with pytest.raises(UserError, match="not the weights of a TokenFlow generator.*query_norm"):
        from_official(plain, made.layout)
    with pytest.raises(UserError, match="this generator is for 21 tokens, but the tokenizer gives"):
        from_official(state, grid_layout(4, 4, Categorical(16)))


def test_published_size() -> None:
    layout = Layout(tuple(Segment((p, p), Categorical(32_768), f"scale{p}") for p in SIDES[16]))
    with torch.device("meta"):
        made = tokenflow_7b(layout)
    assert sum(p.numel() for p in made.parameters()) == 7_027_204_096
    assert made.output.weight.shape == (64_769, 4096)

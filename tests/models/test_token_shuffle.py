"""Token-Shuffle: windows, causality, joint text, warm starts, sizes. Recorded outputs are in tests/interop."""

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.token_shuffle import (
    TokenShuffle,
    token_shuffle_2b7,
    token_shuffle_b,
    token_shuffle_l,
)
from tessellar.models.token_shuffle.official import from_official, to_official
from tessellar.models.token_shuffle.warm_start import start_from_text, warm_start
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition, cat
from tessellar.protocol.guidance import Guidance, HalfLinear
from tessellar.protocol.layout import (
    Categorical,
    Continuous,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.prepare import prepared
from tessellar.sampling.settings import GREEDY, Sampling
from tessellar.sampling.speculative import Rules, speculative_jacobi

GRID = grid_layout(4, 6, Categorical(23))
SEQUENCE = sequence_layout(24, Categorical(23))
GUIDANCE = Guidance(HalfLinear(3.0))
CLASSES = {"num_classes": 7}
CAPTIONS = {"caption_dim": 6, "caption_length": 5}
TEXT = {"text_vocab": 11, "bos": 3, "caption_length": 5}


def model(layout: Layout = GRID, kind: dict = TEXT, **options) -> TokenShuffle:
    torch.manual_seed(0)
    generator = TokenShuffle(layout, 32, 2, 4, **{"ffn_hidden": 40, **kind, **options})
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


def condition(kind: dict, batch: int = 3) -> Condition:
    draw = torch.Generator().manual_seed(1)
    valid = torch.arange(5) >= torch.tensor([0, 2, 3])[torch.arange(batch) % 3][:, None]
    if kind is CLASSES:
        return Condition(ids=torch.arange(batch) % 7)
    if kind is CAPTIONS:
        return Condition(
            valid=valid, features=torch.randn(batch, 5, 6, generator=draw) * valid[..., None]
        )
    return Condition(ids=torch.randint(0, 11, (batch, 5), generator=draw), valid=valid)


def tokens_of(batch: int = 3) -> Tensor:
    return torch.randint(0, 23, (batch, 24), generator=torch.Generator().manual_seed(2))


def greedy(generator: TokenShuffle, given: Condition, seeds: range = range(3)) -> Tensor:
    return Ancestral()(generator, given, GREEDY, Noise(seeds), GUIDANCE)


def test_windows_of_one_code_without_blocks_are_llamagen() -> None:
    """Bit for bit, with LlamaGen's rotation."""
    torch.manual_seed(0)
    plain = LlamaGen(GRID, 32, 2, 4, num_classes=7, ffn_multiple_of=8, dropout=0.0)
    ours = TokenShuffle(GRID, 32, 2, 4, 1, 0, num_classes=7, ffn_multiple_of=8, rotary="grid")
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(plain.state_dict())
    given = condition(CLASSES)
    theirs = plain.eval().loss(tokens_of(), given)["cross_entropy"]
    assert torch.allclose(
        ours.eval().loss(tokens_of(), given)["cross_entropy"], theirs, atol=1e-6, rtol=0
    )
    assert torch.equal(
        plain.score(tokens_of(), given).logits, ours.score(tokens_of(), given).logits
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", [GRID, SEQUENCE], ids=["grid", "sequence"])
@pytest.mark.parametrize("kind", [CLASSES, CAPTIONS, TEXT], ids=["class", "features", "text"])
@torch.no_grad()
def test_a_code_changes_later_windows_alone(layout: Layout, kind: dict) -> None:
    generator, tokens = model(layout, kind), tokens_of()
    place = 9  # row 1, column 3: window 1 of the grid, window 2 of the sequence
    window = 1 if layout is GRID else 2
    before = generator.score(tokens, condition(kind)).logits  # type: ignore[attr-defined]
    tokens[:, place] = (tokens[:, place] + 1) % 23
    after = generator.score(tokens, condition(kind)).logits  # type: ignore[attr-defined]
    assert before.shape == (3, 24, 23)
    assert torch.equal(before[:, : 4 * window + 4], after[:, : 4 * window + 4])
    assert bool((before[:, 4 * window + 4 :] != after[:, 4 * window + 4 :]).any(-1).all())


@pytest.mark.parametrize("kind", [CLASSES, CAPTIONS, TEXT], ids=["class", "features", "text"])
def test_decoding_is_teacher_forcing_and_batches_are_their_images(kind: dict) -> None:
    """Greedy codes with a cache and guidance are the argmax of guided teacher-forced logits; prompts of any length."""
    generator, given = model(kind=kind), condition(kind)
    tokens = greedy(generator, given)
    both = [generator.score(tokens, c).logits for c in (given, generator.null(given))]  # type: ignore[attr-defined]
    scale = GUIDANCE.schedule(generator.entities.numbers[None], generator.entities)  # type: ignore[misc]
    guided = both[1] + scale[..., None] * (both[0] - both[1])
    assert torch.equal(
        generator.entities.get(tokens, torch.zeros(3, dtype=torch.int64), 6), guided.argmax(-1)
    )
    for row in range(3):
        assert torch.equal(
            greedy(generator, given.select(torch.tensor([row])), range(row, row + 1))[0],
            tokens[row],
        )


@pytest.mark.parametrize("kind", [CLASSES, TEXT], ids=["class", "text"])
def test_speculative_decoding_judges_whole_windows(kind: dict) -> None:
    """A window is kept where all of its codes are: greedy results are those of plain decoding."""
    generator, given = model(kind=kind), condition(kind)
    fast = speculative_jacobi(
        generator, given, GREEDY.choice, Noise(range(3)), GUIDANCE, Rules(window=4)
    )
    assert torch.equal(fast, greedy(generator, given))


def test_codes_of_a_window_are_drawn_independently() -> None:
    """Pairs of the only window's codes are the product of their own frequencies."""
    generator = model(grid_layout(2, 2, Categorical(3)), CLASSES)
    given = Condition(ids=torch.zeros(4000, dtype=torch.int64))
    drawn = Ancestral()(
        generator, given, Sampling(choice=Choice(temperature=3.0)), Noise(range(4000))
    )
    table = (
        torch.nn.functional.one_hot(drawn[:, 0] * 3 + drawn[:, 3], 9).double().mean(0).view(3, 3)
    )
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True)
    statistic = 4000 * ((table - expected).square() / expected).sum()
    assert float(statistic) < 18.5  # the 0.999 quantile of chi-square with 4 degrees of freedom
    assert (
        float((table.sum(0) - table.sum(1)).abs().max()) > 0.02
    )  # the two places have laws of their own


def test_the_unconditional_prompt_is_begin_of_text_and_is_learnt_by_dropout() -> None:
    generator = model(condition_dropout=1.0)
    null = generator.null(condition(TEXT))
    assert null.ids is not None and null.ids.tolist() == [[3], [3], [3]]
    in_eval = generator.loss(tokens_of(), null)
    dropped = generator.train().loss(tokens_of(), condition(TEXT))
    assert torch.allclose(in_eval["cross_entropy"], dropped["cross_entropy"], atol=1e-5)
    assert not torch.allclose(
        generator.eval().loss(tokens_of(), condition(TEXT))["text"], dropped["text"]
    )


def test_losses_count_codes_text_and_their_normalisers() -> None:
    """Text counts a token as codes do; padding counts nothing; samples may be left out."""
    generator, given, tokens = model(text_loss_weight=2.0, z_loss=0.1), condition(TEXT), tokens_of()
    losses = generator.loss(tokens, given)
    made = generator.predictions(tokens, given)
    assert made.text_logits is not None and made.text_targets is not None
    real = made.text_targets >= 0
    assert real.sum(1).tolist() == [6, 4, 3]  # what follows each token, begin and end of the image
    nll = -made.text_logits.log_softmax(-1).gather(-1, made.text_targets.clamp(min=0)[..., None])[
        ..., 0
    ]
    assert torch.allclose(
        losses["text"], nll[real].mean()
    )  # a cross-entropy, whatever the length of the text
    weights = (
        generator.output.weight
        if generator.output is not None
        else generator.token_embedding.weight
    )
    of_text = losses["text"] + losses["text_balance"]
    wanted = 2 * (nll * real).sum() / tokens.numel()  # a text token counts two codes
    assert torch.allclose(of_text, wanted)
    (slope,) = torch.autograd.grad(of_text, weights, retain_graph=True)
    (wanted_slope,) = torch.autograd.grad(wanted, weights, retain_graph=True)
    assert torch.allclose(slope, wanted_slope, atol=1e-7)
    squares = torch.cat(
        [
            made.logits.logsumexp(-1).square().flatten(),
            made.text_logits.logsumexp(-1).square()[real],
        ]
    )
    assert torch.allclose(losses["z"], 0.1 * squares.mean())
    first = generator.loss(tokens[:1], given.select(torch.tensor([0])))
    weighed = generator.loss(tokens, given, torch.tensor([1.0, 0.0, 0.0]))
    assert all(torch.allclose(first[name], weighed[name], atol=1e-5) for name in losses)


def test_the_sum_of_the_terms_is_what_its_gradient_says() -> None:
    """A small step of the weights changes the printed total by the step times the gradient."""
    generator = model(text_loss_weight=2.0, z_loss=0.1).double()
    weights = generator.token_embedding.weight
    total = torch.stack(list(generator.loss(tokens_of(), condition(TEXT)).values())).sum()
    (slope,) = torch.autograd.grad(total, weights)
    with torch.no_grad():
        weights += 1e-5 * slope
    after = torch.stack(list(generator.loss(tokens_of(), condition(TEXT)).values())).sum()
    change = float((after - total).detach())
    assert change == pytest.approx(1e-5 * float(slope.square().sum()), rel=1e-3)


def test_gradients_reach_every_parameter() -> None:
    generator = model(kind=TEXT).train()
    sum(generator.loss(tokens_of(), condition(TEXT)).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and bool(p.grad.any()) for p in generator.parameters())


def test_grouped_queries_are_repeated_keys() -> None:
    """Two key heads for four queries are four key heads of equal weights; also with a cache."""
    grouped, full = model(num_kv_heads=2), model()
    state = grouped.state_dict()
    for key in [key for key in state if key.endswith("wqkv.weight")]:
        q, k, v = state[key].split((32, 16, 16))
        k, v = (x.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
        state[key] = torch.cat([q, k, v])
    full.load_state_dict(state)
    given = condition(TEXT)
    assert torch.allclose(
        grouped.score(tokens_of(), given).logits, full.score(tokens_of(), given).logits, atol=1e-4
    )  # type: ignore[attr-defined]
    with prepared(grouped):
        tokens = greedy(grouped, given)
    assert torch.equal(tokens, greedy(full, given))
    again = from_official(to_official(grouped), GRID, 4, bos=3)
    assert torch.equal(greedy(again, given), tokens)


def test_a_warm_start_keeps_the_backbone_and_begins_as_the_identity() -> None:
    torch.manual_seed(0)
    plain = LlamaGen(GRID, 32, 2, 4, num_classes=7, ffn_multiple_of=8)
    ours = TokenShuffle(GRID, 32, 2, 4, 2, num_classes=7, ffn_multiple_of=8)
    torch.nn.init.normal_(plain.output.weight)
    warm_start(ours, plain)
    for name in ("layers.1.attention.wqkv.weight", "output.weight", "token_embedding.weight"):
        assert torch.equal(ours.state_dict()[name], plain.state_dict()[name])
    x = torch.randn(2, 32)
    assert torch.equal(ours.shuffle.blocks(x), x) and torch.equal(ours.unshuffle.blocks(x), x)
    with pytest.raises(UserError, match="same backbone"):
        warm_start(TokenShuffle(GRID, 32, 1, 4, num_classes=7, ffn_multiple_of=8), plain)


def rotated_halves(x: Tensor) -> Tensor:
    """Rotary positions as Hugging Face's Llama has them: channel j of a head pairs with j + d / 2. x [n, H, d]."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = (torch.cat([t, t], -1)[:, None] for t in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def text_llama(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """One layer of a Llama with 4 heads and 2 key heads in Hugging Face's names, at ids [n]."""

    def normed(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.rms_norm(x, (32,), state[f"model.{name}.weight"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"model.layers.0.{name}.weight"].T

    x = state["model.embed_tokens.weight"][ids]
    read = normed(x, "layers.0.input_layernorm")
    q, k, v = (linear(read, f"self_attn.{name}_proj").unflatten(-1, (-1, 8)) for name in "qkv")
    q, k, v = (
        rotated_halves(q),
        rotated_halves(k).repeat_interleave(2, 1),
        v.repeat_interleave(2, 1),
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    mixed = torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v
    ).flatten(1)
    x = x + linear(mixed, "self_attn.o_proj")
    read = normed(x, "layers.0.post_attention_layernorm")
    gate = torch.nn.functional.silu(linear(read, "mlp.gate_proj")) * linear(read, "mlp.up_proj")
    return normed(x + linear(gate, "mlp.down_proj"), "norm")


def test_a_text_llama_becomes_the_backbone() -> None:
    """Hidden states of a text are those of the text model, whose rotation pairs the halves of a head."""
    sizes = {
        "self_attn.q": (32, 32),
        "self_attn.k": (16, 32),
        "self_attn.v": (16, 32),
        "self_attn.o": (32, 32),
    }
    sizes |= {"mlp.gate": (40, 32), "mlp.up": (40, 32), "mlp.down": (32, 40)}
    draw = torch.Generator().manual_seed(0)
    state = {
        f"model.layers.0.{name}_proj.weight": torch.randn(s, generator=draw) * 0.3
        for name, s in sizes.items()
    }
    state["model.embed_tokens.weight"] = torch.randn(11, 32, generator=draw)
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        state[f"model.{name}.weight"] = torch.rand(32, generator=draw) + 0.5
    torch.manual_seed(0)
    generator = TokenShuffle(GRID, 32, 1, 4, num_kv_heads=2, ffn_hidden=40, **TEXT).eval()  # type: ignore[arg-type]
    start_from_text(generator, state)
    given = condition(TEXT, 1)
    assert given.ids is not None
    ours = generator.hidden_states(tokens_of(1), given)[0, :5]
    assert torch.allclose(ours, text_llama(state, given.ids[0]), atol=1e-5)
    with pytest.raises(UserError, match="is missing"):
        start_from_text(generator, {})


def test_published_sizes_and_high_resolutions() -> None:
    layout = grid_layout(16, 16, Categorical(16384))
    with torch.device("meta"):
        large = token_shuffle_2b7(grid_layout(128, 128, Categorical(16384)))
        made = {
            large: 2_789_634_816,
            token_shuffle_b(layout): 115_909_056,
            token_shuffle_l(layout): 351_833_344,
        }
        small = [
            TokenShuffle(layout, 768, 1, 12, window, num_classes=1000).work()
            for window in (1, 2, 4)
        ]
    assert all(
        sum(p.numel() for p in generator.parameters()) == count for generator, count in made.items()
    )
    assert large.z_loss == 1e-5
    assert large.entities.count == 4096 and large.work().positions == 4096 + 512
    assert [work.positions for work in small] == [256, 64, 16]
    assert small[1].backbone < 0.3 * small[0].backbone


def test_extra_parameters_are_the_papers_formula() -> None:
    def count(window: int) -> int:
        with torch.device("meta"):
            made = TokenShuffle(
                grid_layout(4, 4, Categorical(5)), 64, 1, 4, window, 2, 3.0, num_classes=2
            )
            plain = TokenShuffle(grid_layout(4, 4, Categorical(5)), 64, 1, 4, 1, 0, num_classes=2)
        return sum(p.numel() for p in made.parameters()) - sum(
            p.numel() for p in plain.parameters()
        )

    d, ratio = 64, 3
    for window in (2, 4):
        narrow = d // window**2
        assert count(window) == d * narrow + narrow + narrow * d + d + 4 * (
            2 * d * ratio * d + ratio * d + d
        )


@pytest.mark.parametrize(
    "layout, options, message",
    [
        (
            grid_layout(4, 6, Categorical(5)),
            {"window": 4, **CLASSES},
            "4x4 do not divide the grid of 4x6",
        ),
        (sequence_layout(10, Categorical(5)), CLASSES, "windows of 4 do not divide"),
        (GRID, {"window": 3, **CLASSES}, "width that 9 divides; it is 32"),
        (GRID, {}, "exactly one of num_classes"),
        (GRID, {**CLASSES, **TEXT}, "exactly one of num_classes"),
        (GRID, {**TEXT, "bos": 11}, "bos is 11"),
        (GRID, {**TEXT, "rotary": "grid"}, "prefix of fixed length"),
        (grid_layout(4, 4, Continuous(3)), CLASSES, "categorical"),
        (
            Layout((Segment((4,), Categorical(5)), Segment((4, 4), Categorical(5)))),
            CLASSES,
            "one grid",
        ),
    ],
)
def test_what_does_not_fit_is_said(layout: Layout, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenShuffle(layout, 32, 1, 4, **options)


def test_mixed_lengths_stack_with_padding_on_the_left() -> None:
    both = cat([condition(TEXT, 1), model().null(condition(TEXT, 1))])
    assert both.valid is not None and both.valid.tolist() == [[True] * 5, [False] * 4 + [True]]

"""Tokenizers of Open-MAGVIT2 and IBQ: published sizes, sub-tokens of bits, gradients, and files of Lightning with
averages."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.protocol.layout import Factorized
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tokenizers.ibq import IBQVQGAN, ibq_1024, ibq_8192, ibq_16384, ibq_262144
from tessellar.tokenizers.ibq import official as ibq
from tessellar.tokenizers.open_magvit2 import OpenMAGVIT2, open_magvit2_128, open_magvit2_256
from tessellar.tokenizers.open_magvit2 import official as open_magvit2
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.lfq import LFQ


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (open_magvit2_256, 115_127_829),
        (open_magvit2_128, 112_021_653),
        (ibq_1024, 107_049_859),
        (ibq_8192, 108_884_867),
        (ibq_16384, 110_982_019),
        (ibq_262144, 173_896_579),
    ],
)
def test_published_variants(preset: Callable[[], Tokenizer], count: int) -> None:
    with torch.device("meta"):
        made = preset()
    assert sum(parameter.numel() for parameter in made.parameters()) == count
    assert made.layout.grid == (16, 16)


def test_halves_of_open_magvit2() -> None:
    with torch.device("meta"):
        made = open_magvit2_256()
    halves = [sum(p.numel() for p in half.parameters()) for half in (made.encoder, made.decoder)]
    assert halves == [49_751_442, 65_376_387]
    assert made.layout.segments[0].kind == Factorized((64, 4096))


def small(kind: str) -> OpenMAGVIT2 | IBQVQGAN:
    torch.manual_seed(0)
    if kind == "ibq":
        return IBQVQGAN(IBQ(24, 6), 16, 32, (1, 2), 1, 16)
    return OpenMAGVIT2(LFQ(6, split=(2, 4)), 16, 32, (1, 2), 1)


@pytest.mark.parametrize("kind", ["ibq", "lfq"])
def test_forward_is_decode_of_encode(kind: str) -> None:
    made = small(kind).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = made(images)
    tokens = made.encode(images)
    made.layout.check(tokens)
    assert torch.equal(tokens, output.tokens) and len(tokens.unique()) > 2
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ibq", "lfq"])
def test_gradients_reach_every_parameter(kind: str) -> None:
    """All codes of IBQ, chosen or not."""
    made = small(kind)
    output = made(torch.rand(2, 3, 16, 16) * 2 - 1)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in without if not n.endswith("k.bias")]
    if kind == "ibq":
        used = len(output.tokens.unique())
        assert isinstance(made.quantizer, IBQ) and made.quantizer.codebook.weight.grad is not None
        assert used < 24 and bool(made.quantizer.codebook.weight.grad.abs().amax(1).gt(0).all())


def test_sub_tokens_are_the_bits_of_the_whole_code() -> None:
    """Little-endian: the whole code is the first sub-token and 2^6 times the second."""
    whole = LFQ(18)
    parts = LFQ(18, split=(6, 12))
    z = torch.randn(3, 50, 18)
    first, second = parts.encode(z).unbind(-1)
    assert torch.equal(whole.encode(z), first + (second << 6))
    assert torch.equal(parts.decode(parts.encode(z)), whole.decode(whole.encode(z)))
    assert int(parts.encode(torch.eye(18)[7:8] * 2 - 1)[0, 1]) == 2


def test_vectors_compared_a_few_at_a_time_are_compared_as_all_are() -> None:
    """Losses, tokens, and gradients of vectors and codes."""
    found = []
    for rows in (None, 3):
        torch.manual_seed(0)
        made = IBQ(24, 6, rows_at_once=rows).train()
        z = torch.randn(2, 5, 6, requires_grad=True)
        out = made(z)
        (out.quantized.square().sum() + torch.stack(list(out.losses.values())).sum()).backward()
        found.append((out.tokens, *out.losses.values(), z.grad, made.codebook.weight.grad))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)
    with pytest.raises(ValueError, match="rows_at_once is 0"):
        IBQ(24, 6, rows_at_once=0)


def lightning(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A checkpoint of the official training: averages without dots, and a discriminator."""
    averages = {f"model_ema.{name.replace('.', '')}": t + 1 for name, t in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2)}
    whole = {**state, **averages, **counters, **loss}
    return {f"{prefix}{name}": tensor for name, tensor in whole.items()}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_average_of_a_lightning_checkpoint_is_taken(prefix: str) -> None:
    """Also of the tokenizer that lies in a generator's checkpoint."""
    for module, kind, name in (
        (open_magvit2, "lfq", "decoder.conv_out.bias"),
        (ibq, "ibq", "quantize.embedding.weight"),
    ):
        state = module.to_official(small(kind))  # type: ignore[arg-type]
        content = lightning(state, prefix)
        if prefix:
            content["transformer.norm.weight"] = torch.ones(3)
        read = module.OFFICIAL.read({"state_dict": content, "epoch": 269}, "x.ckpt")
        options = ImportOptions(image_size=16, variant="2+4" if kind == "lfq" else None)
        made = module.OFFICIAL.build(read, options)
        assert torch.equal(module.to_official(made)[name], state[name] + 1)  # type: ignore[arg-type]


def test_averages_that_do_not_fit_are_refused_by_name() -> None:
    state = lightning(ibq.to_official(small("ibq")))  # type: ignore[arg-type]
    del state["model_ema.quant_convbias"]
    with pytest.raises(UserError, match="1 no average of: quant_conv.bias"):
        ibq.from_official(state, 16)


def test_a_split_that_is_not_known_is_asked_for() -> None:
    state = open_magvit2.to_official(small("lfq"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="how tokens of 6 bits are split is not known"):
        open_magvit2.from_official(state, 16)
    with pytest.raises(UserError, match="--variant is 'L'; of Open-MAGVIT2 it is the bits"):
        open_magvit2.OFFICIAL.build(state, ImportOptions(variant="L"))
    with pytest.raises(UserError, match=r"tokens of 6 bits, not 2\+3"):
        open_magvit2.from_official(state, 16, (2, 3))

"""One-D-Piece: prefixes decode from themselves alone, training draws their length, a budget or a quality chooses it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.protocol.layout import Categorical, Layout, Segment, sequence_layout
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN, PixelDecoder, ProxyCodes
from tessellar.tokenizers.one_d_piece import OneDPiece, TailDrop
from tessellar.tokenizers.one_d_piece import tokenizer as presets
from tessellar.tokenizers.one_d_piece.official import OFFICIAL
from tessellar.tokenizers.parts.prefix_length import (
    candidates,
    length_for_bytes,
    length_for_quality,
    prefix_bits,
    prefix_bytes,
    quality_by_length,
)
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok import ViTSize
from tessellar.tokenizers.titok.official import to_official

N = 8


def make(seed: int = 0, **options: Any) -> OneDPiece:
    torch.manual_seed(seed)
    made = OneDPiece(
        VectorQuantizer(24, 5), 16, 4, N, ViTSize(32, 1, 4), ViTSize(24, 2, 2), **options
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def keep(tokenizer: OneDPiece, length: int) -> OneDPiece:
    """In training, with the draw fixed."""
    tokenizer.draw_length = lambda: length
    return tokenizer.train()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_forward_is_decode_of_encode(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens, output = tokenizer.encode(images), tokenizer(images)
    assert tokenizer.layout == sequence_layout(N, Categorical(24), min_prefix=1)
    assert torch.equal(tokens, output.tokens) and output.shorter is None
    torch.testing.assert_close(tokenizer.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)


def test_any_prefix_decodes_and_each_token_counts(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens = tokenizer.encode(images)
    pictures = [tokenizer.decode(tokens[:, :n]).detach() for n in range(1, N + 1)]
    assert all(
        float((a - b).abs().max()) > 1e-4 for a, b in zip(pictures, pictures[1:], strict=False)
    )
    for length in (0, N + 1):
        with pytest.raises(ValueError, match="tokens have shape"):
            tokenizer.decode(torch.zeros(1, length, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokens have shape"):
        make(drop=TailDrop(shortest=3)).decode(tokens[:, :2])


def test_training_decodes_a_prefix_and_quantizes_all(images: Tensor) -> None:
    tokenizer = keep(make(), 3)
    output = tokenizer(images)
    torch.testing.assert_close(
        output.reconstruction, tokenizer.decode(output.tokens[:, :3]), atol=2e-5, rtol=0
    )
    assert output.tokens.shape == (3, N)
    everything = tokenizer.quantizer(tokenizer.latents(images)).losses
    torch.testing.assert_close(output.losses["codebook"], everything["codebook"])


def test_dropped_tokens_get_no_gradient(images: Tensor) -> None:
    tokenizer = keep(make(), 3)
    seen: list[Tensor] = []

    def watch(_: Any, __: Any, output: Any) -> None:
        output.quantized.retain_grad()
        seen.append(output.quantized)

    tokenizer.quantizer.register_forward_hook(watch)
    tokenizer(images).reconstruction.square().mean().backward()
    gradient, positions = seen[0].grad, tokenizer.decoder.token_positions.grad
    assert gradient is not None and positions is not None
    assert (
        float(gradient[:, 3:].abs().max()) == 0
        and float(gradient[:, :3].abs().amax((0, 2)).min()) > 0
    )
    assert float(positions[3:].abs().max()) == 0 and float(positions[:3].abs().amax(1).min()) > 0


def test_lengths_are_uniform() -> None:
    """Chi-square with 7 degrees of freedom beyond 29.9: one draw in 10,000; the seed is fixed."""
    tokenizer = make().train()
    counts = torch.tensor([tokenizer.draw_length() for _ in range(1600)]).bincount(minlength=N + 1)
    assert int(counts[0]) == 0 and len(counts) == N + 1
    assert float(((counts[1:] - 200.0) ** 2 / 200).sum()) < 29.9
    assert {make().eval().draw_length() for _ in range(20)} == {N}
    late = make(drop=TailDrop(shortest=6)).train()
    assert {late.draw_length() for _ in range(60)} == {6, 7, 8}


def test_cross_length_training_adds_the_losses_of_both(images: Tensor) -> None:
    tokenizer = keep(make(drop=TailDrop(cross_length=True)), 2)
    output = tokenizer(images)
    assert output.shorter is not None
    torch.testing.assert_close(
        output.reconstruction, tokenizer.decode(output.tokens), atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        output.shorter, tokenizer.decode(output.tokens[:, :2]), atol=2e-5, rtol=0
    )
    loss = TokenizerLoss(Reconstruction(l2=1.0))
    both = loss.generator_loss(images, output, 0, tokenizer.last_layer)
    likeness = [(x - images).square().mean() for x in (output.reconstruction, output.shorter)]
    torch.testing.assert_close(both.total, sum(likeness) + sum(output.losses.values()))
    torch.testing.assert_close(both.terms["shorter_l2"], likeness[1])
    assert tokenizer.eval()(images).shorter is None


def test_alignment_pulls_the_prefix_alone(images: Tensor) -> None:
    tokenizer = keep(make(drop=TailDrop(cross_length=True, alignment=2.0)), 2)
    vectors = tokenizer.quantizer.decode(tokenizer.encode(images)).detach()
    full, short = vectors.clone().requires_grad_(), vectors[:, :2].clone().requires_grad_()
    distance = tokenizer.alignment(tokenizer.decoder(short), tokenizer.decoder(full))
    distance.backward()
    assert float(distance.detach()) > 0 and full.grad is None and short.grad is not None
    torch.testing.assert_close(tokenizer(images).losses["alignment"], 2 * distance)
    same = keep(tokenizer, N)(images).losses["alignment"]
    assert abs(float(same.detach())) < 1e-5


def test_first_stage_trains_both_lengths(images: Tensor) -> None:
    torch.manual_seed(3)
    vqgan = MaskGITVQGAN(VectorQuantizer(20, 8, l2_normalize=False), 16, 32, (1, 1, 2), 1)
    pixels = PixelDecoder(20, 8, 32, (1, 1, 2), 1)
    given: dict[str, Any] = {"pixels": pixels, "stage": "proxy", "target": ProxyCodes(vqgan)}
    output = keep(make(**given, drop=TailDrop(cross_length=True)), 2)(images)
    losses = {name: float(value.detach()) for name, value in output.losses.items()}
    assert (
        losses["proxy"] > 0
        and losses["shorter_proxy"] > 0
        and losses["proxy"] != losses["shorter_proxy"]
    )
    assert output.shorter is None and not output.reconstruction.numel()


def test_short_training_makes_more_tokens_better(images: Tensor) -> None:
    tokenizer = make().train()
    loss, optimizer = (
        TokenizerLoss(Reconstruction(l2=1.0)),
        torch.optim.AdamW(tokenizer.parameters(), 3e-3),
    )
    smooth = torch.nn.functional.interpolate(images[..., ::8, ::8], 16, mode="bilinear")
    for step in range(40):
        total = loss.generator_loss(smooth, tokenizer(smooth), step, tokenizer.last_layer).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    quality = dict(quality_by_length(tokenizer.eval(), smooth, [1, N]))
    assert float(quality[N].mean()) > float(quality[1].mean()) and float(quality[N].mean()) > 8


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="shortest of TailDrop is 0; it must be an integer of at"):
        TailDrop(shortest=0)
    with pytest.raises(ValueError, match="shortest prefix is 9; it must be in \\[1, 8\\]"):
        make(drop=TailDrop(shortest=N + 1))
    with pytest.raises(ValueError, match="needs cross_length"):
        make(drop=TailDrop(alignment=1.0))


@pytest.mark.parametrize(
    ("preset", "parameters", "first"),
    [
        ("one_d_piece_s256", 83_871_247, 53_130_764),
        ("one_d_piece_b256", 205_256_463, 174_515_980),
        ("one_d_piece_l256", 641_742_863, 611_002_380),
    ],
)
def test_parameters_of_the_published_variants(preset: str, parameters: int, first: int) -> None:
    with torch.device("meta"):
        made = getattr(presets, preset)()
    assert sum(p.numel() for p in made.parameters()) == parameters
    assert (
        sum(p.numel() for n, p in made.named_parameters() if not n.startswith("pixels.")) == first
    )
    assert made.layout == sequence_layout(256, Categorical(4096), 1) and made.encoder.mixes


def test_import_makes_a_one_d_piece(images: Tensor) -> None:
    pixels = PixelDecoder(20, 8, 32, (1, 1, 2), 1)
    torch.manual_seed(0)
    made = OneDPiece(
        VectorQuantizer(24, 5),
        16,
        4,
        N,
        ViTSize(32, 1, 2),
        ViTSize(24, 2, 2),
        pixels,
        True,
        "decoder",
    )
    again = OFFICIAL.build(to_official(made.eval()), ImportOptions(num_heads=2))
    assert again.layout == made.layout and torch.equal(again.encode(images), made.encode(images))
    torch.testing.assert_close(
        again.decode(again.encode(images)[:, :3]), made.decode(made.encode(images)[:, :3])
    )


def test_bytes_choose_the_length() -> None:
    layout = sequence_layout(256, Categorical(4096), 1)
    assert prefix_bits(layout)[[0, 1, 255]].tolist() == [12, 24, 3072]
    assert [prefix_bytes(layout, n) for n in (1, 2, 256)] == [2, 3, 384]
    assert [length_for_bytes(layout, size) for size in (2, 3, 100, 383, 10_000)] == [
        1,
        2,
        66,
        255,
        256,
    ]
    for size in range(2, 50):
        assert prefix_bytes(layout, length_for_bytes(layout, size)) <= size
    with pytest.raises(UserError, match="1 bytes hold 0 tokens; the shortest prefix is 1: 2 bytes"):
        length_for_bytes(layout, 1)
    mixed = Layout((Segment((2,), Categorical(5)), Segment((2,), Categorical(2))), 1)
    assert prefix_bits(mixed).tolist() == [3, 6, 7, 8]
    with pytest.raises(UserError, match="only complete sequences"):
        length_for_bytes(sequence_layout(4, Categorical(4)), 9)


def test_quality_chooses_the_length(images: Tensor) -> None:
    tokenizer = make().eval()
    measured = dict(quality_by_length(tokenizer, images))
    assert list(measured) == [1, 2, 4, 8] and candidates(
        sequence_layout(24, Categorical(2), 3)
    ) == (3, 6, 12, 24)
    wanted = float(torch.stack(list(measured.values())).median())
    chosen = length_for_quality(tokenizer, images, wanted)
    for number, length in enumerate(chosen.tolist()):
        reached = [n for n, psnr in measured.items() if float(psnr[number]) >= wanted]
        assert length == (reached[0] if reached else N)
    assert length_for_quality(tokenizer, images, 99.0).tolist() == [N] * 3
    assert length_for_quality(tokenizer, images, -99.0, [5, 2]).tolist() == [2] * 3
    with pytest.raises(UserError, match=r"lengths are \[0, 4\]; each must be in \[1, 8\]"):
        length_for_quality(tokenizer, images, 20.0, [4, 0])

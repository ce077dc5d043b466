"""TokenFlow's tokenizer: one index into two codebooks, scales that add up and whose prefixes decode, both decoders."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessellar.errors import UserError
from tessellar.networks.vision import teacher
from tessellar.protocol.configured import build
from tessellar.tokenizers.tokenflow import (
    SemanticDecoderSize,
    SemanticVision,
    SharedQuantizer,
    TokenFlow,
    semantic_teacher,
    tokenflow_b,
    tokenflow_b_256,
    tokenflow_l,
    tokenflow_xl,
)
from tessellar.tokenizers.tokenflow.tokenizer import AS_IS, SIGLIP_SO400M

CLIP = "vit_base_patch16_clip_quickgelu_224"
SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def vision(**options: Any) -> SemanticVision:
    return SemanticVision(CLIP, None, 16, SIZES, AS_IS, **options)


def model(
    seed: int = 0, image_size: int = 16, sides: tuple[int, ...] = (1, 2, 4), **options: Any
) -> TokenFlow:
    torch.manual_seed(seed)
    options = {"semantic_dim": 6, "decoder_size": SemanticDecoderSize(16, 1, 2)} | options
    quantizer = SharedQuantizer(30, 5, 3, sides=sides, entropy_weight=0.1)
    return TokenFlow(quantizer, vision(), image_size, 32, (1, 1, 1), 1, 8, **options)


def images(size: int = 16, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_forward_is_decode_of_encode_and_what_was_taken_adds_up() -> None:
    made = model().eval()
    tokens, output = made.encode(images()), made(images())
    assert tokens.shape == (2, 21) and torch.equal(tokens, output.tokens)
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)
    added = [maps for _, _, maps in made.quantizer.scan(made.latents(images()))]
    *_, total = made.quantizer.sums(tokens)
    torch.testing.assert_close(total, torch.stack(added).sum(0))


@torch.no_grad()
def test_one_index_stands_for_both_codes() -> None:
    made = model().eval().quantizer
    z = torch.randn(2, 16, 8)
    tokens, vectors = made.encode(z), made.decode(made.encode(z))
    order = torch.randperm(30)
    codes = made.codebook.weight.clone()
    made.codebook.weight.copy_(codes[order])
    assert torch.equal(order[made.encode(z)], tokens)
    torch.testing.assert_close(made.decode(made.encode(z)), vectors)
    # Rows of any length, in either codebook, and vectors of any length at the first scale.
    scale = torch.rand(30, 2).repeat_interleave(torch.tensor([5, 3]), dim=1) + 0.1
    made.codebook.weight.copy_(codes * scale)
    assert torch.equal(made.encode(z), tokens)
    # Only one of both codebooks permuted: another law.
    made.codebook.weight[:, :5] = codes[order][:, :5]
    assert not torch.equal(made.encode(z), tokens)


@torch.no_grad()
def test_the_index_minimises_the_sum_of_both_distances() -> None:
    made = SharedQuantizer(40, 4, 3, sides=(1,), pixel_weight=0.5)
    z = torch.randn(5, 1, 7)
    parts = [
        torch.nn.functional.normalize(t, dim=-1)
        for t in (*z.split((4, 3), -1), *made.codebook.weight.split((4, 3), -1))
    ]
    semantic, pixel, semantic_codes, pixel_codes = parts
    distance = (semantic - semantic_codes).square().sum(-1) + 0.5 * (
        pixel - pixel_codes
    ).square().sum(-1)
    assert torch.equal(made.encode(z)[:, 0], distance.argmin(-1))


@torch.no_grad()
def test_prefixes_of_scales_decode_and_others_are_refused() -> None:
    made = model().eval()
    tokens = made.encode(images())
    pictures = [made.decode(tokens[:, :n]) for n in (1, 5, 21)]
    assert all(picture.shape == (2, 3, 16, 16) for picture in pictures)
    assert all(not torch.equal(a, b) for a, b in pairwise(pictures))
    assert made.semantics(tokens[:, :5]).shape == (2, 16, 6)
    for wrong in (2, 6, 20):
        with pytest.raises(UserError, match=f"{wrong} tokens end within a scale.*1, 5, 21"):
            made.decode(tokens[:, :wrong])


@torch.no_grad()
def test_inputs_of_a_scale_are_enlarged_from_scale_to_scale() -> None:
    made = model().eval()
    tokens = made.encode(images())
    inputs = made.next_inputs(tokens, 3)
    assert inputs.shape == (2, 4 + 16, 8) and made.latent_dim == 8
    first = made.code_vectors(tokens[:, :1])
    torch.testing.assert_close(inputs[:, :4], first.expand(-1, 4, -1))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 30
    assert torch.equal(made.next_inputs(changed, 3), inputs)
    changed[:, 1:5] = (changed[:, 1:5] + 1) % 30
    again = made.next_inputs(changed, 3)
    assert torch.equal(again[:, :4], inputs[:, :4]) and not torch.equal(again[:, 4:], inputs[:, 4:])


def test_training_skips_one_scale_behind_the_first_at_times() -> None:
    made = SharedQuantizer(30, 5, 3, sides=(1, 2, 4), scale_dropout=0.5)
    torch.manual_seed(0)
    drawn = [made.train().draw_skipped() for _ in range(200)]
    assert set(drawn) == {None, 1, 2} and 70 < drawn.count(None) < 130
    assert made.eval().draw_skipped() is None
    z = torch.randn(2, 16, 8)
    whole, without = made.quantize(z), made.quantize(z, skipped=1)
    assert without.tokens.shape == whole.tokens.shape == (2, 21)
    maps = [
        made.added(scale, without.tokens[:, a:b])
        for scale, (a, b) in enumerate(pairwise(made.ends))
    ]
    kept = (maps[0] + maps[2]).flatten(2).mT
    torch.testing.assert_close(without.quantized, kept)
    assert not torch.equal(without.tokens[:, 5:], whole.tokens[:, 5:])


def test_gradients_reach_every_parameter() -> None:
    made = model()
    made.quantizer.scale_dropout = 0.0
    output = made.forward_with(images(), torch.randn(2, 16, 6))
    assert set(output.losses) == {"codebook", "commitment", "entropy", "semantic"}
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not [name for name in without if not name.endswith("k.bias")]


def test_the_teacher_is_no_part_of_the_tokenizer() -> None:
    frozen = teacher(
        "vit_tiny_patch16_224",
        None,
        16,
        {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    )
    frozen.model.filled = True
    made = model(semantic_dim=24, teacher=frozen).train()
    losses = made(images()).losses
    assert 0 < losses["semantic"].item() < 2
    assert made.state_dict().keys() == model(semantic_dim=24).state_dict().keys()
    assert made.config["init_args"]["teacher"] is None
    assert "semantic" not in made.eval()(images()).losses
    with pytest.raises(UserError, match="semantic_dim is 6; the teacher's patches have 24"):
        model(teacher=frozen)


@torch.no_grad()
def test_a_config_and_a_state_dict_rebuild_it() -> None:
    made = model().eval()
    again = build(made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.encode(images()), made.encode(images()))


@torch.no_grad()
def test_one_set_of_weights_reads_larger_images() -> None:
    small, large = model().eval(), model(image_size=24, sides=(1, 2, 4, 6)).eval()
    large.load_state_dict(small.state_dict())
    tokens = large.encode(images(24))
    assert tokens.shape == (2, 57) and large.decode(tokens).shape == (2, 3, 24, 24)
    assert large.semantics(tokens).shape == (2, 36, 6)
    with pytest.raises(ValueError, match=r"needs \[B, 3, 24, 24\]"):
        large.encode(images(16))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        UserError, match="the finest scale is 4 x 4, but images of 24 have 6 x 6 patches"
    ):
        model(image_size=24)
    with pytest.raises(UserError, match="the patches of .*, 4, do not divide 18"):
        model(image_size=18)
    with pytest.raises(UserError, match="stage is \"encoder\"|stage is 'encoder'"):
        model(stage="encoder")
    with pytest.raises(ValueError, match="must grow"):
        SharedQuantizer(30, 5, 3, sides=(2, 2))
    with pytest.raises(UserError, match="reads one layer"):
        vision(layers=(-2, -1))
    with pytest.raises(UserError, match="resnet18 is no plain vision transformer"):
        SemanticVision("resnet18")


def test_vision_models_come_from_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no weights .*clip.pt: give a file"):
        SemanticVision(CLIP, "clip.pt", 16, SIZES)
    source = vision()
    torch.nn.init.normal_(source.network.pos_embed)  # type: ignore[union-attr, arg-type]
    state = {name: tensor.contiguous() for name, tensor in source.network.state_dict().items()}
    save_file(state, tmp_path / "plain.safetensors")
    with pytest.raises(
        UserError, match=r"has no projection to 6 channels of a space of images and texts"
    ):
        semantic_teacher(CLIP, str(tmp_path / "plain.safetensors"), 16, SIZES, shared_dim=6)
    projection = torch.randn(6, 16)
    save_file(state | {"head.weight": projection}, tmp_path / "clip.safetensors")
    file = str(tmp_path / "clip.safetensors")
    read = SemanticVision(CLIP, file, 16, SIZES, AS_IS)
    assert torch.equal(read.network.pos_embed, source.network.pos_embed)  # type: ignore[arg-type]
    frozen = semantic_teacher(CLIP, file, 16, SIZES, AS_IS, shared_dim=6)
    assert frozen.dim == 6 and not any(p.requires_grad for p in frozen.model.parameters())
    expected = read.patch_features(images()) @ projection.T
    torch.testing.assert_close(frozen(images()).patches, expected)


def test_what_no_feature_reads_is_not_trained() -> None:
    sizes = SIGLIP_SO400M["options"] | {
        "patch_size": 7,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
    }
    made = SemanticVision(**{**SIGLIP_SO400M, "image_size": 30, "options": sizes})
    assert made.side == 4
    made.patch_features(images(30)).sum().backward()
    for name, parameter in made.network.named_parameters():
        read = not name.startswith(("blocks.2.", "norm.", "attn_pool."))
        assert parameter.requires_grad == read == (parameter.grad is not None), name


def test_the_decoder_alone_is_trained_in_its_stage() -> None:
    trained = model()
    enhanced: dict[str, Any] = {"decoder_channels": 64, "decoder_blocks": 2}
    made = model(seed=1, stage="decoder", **enhanced).train()
    fresh = {name: t.clone() for name, t in made.state_dict().items()}
    made.load_state_dict(made.starting_from(trained.state_dict()))
    assert torch.equal(made.quantizer.codebook.weight, trained.quantizer.codebook.weight)
    assert torch.equal(made.decoder.conv_in.weight, fresh["decoder.conv_in.weight"])
    output = made(images())
    assert output.losses == {} and not made.quantizer.training and made.decoder.training
    output.reconstruction.square().mean().backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == name.startswith("decoder."), name
    same = model(seed=2, stage="decoder")
    taken = same.starting_from(trained.state_dict())
    assert torch.equal(taken["decoder.conv_in.weight"], trained.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("make", "options", "count", "tokens"),
    [
        (tokenflow_b, {}, 181_902_251, 561),
        (tokenflow_b, {"enhanced": True}, 376_569_643, 561),
        (tokenflow_b_256, {}, 376_569_643, 817),
        (tokenflow_l, {}, 559_964_139, 817),
        (tokenflow_xl, {}, 554_009_963, 2_227),
    ],
)
def test_published_sizes(make: Any, options: dict[str, bool], count: int, tokens: int) -> None:
    with torch.device("meta"):
        made = make(**options)
    assert sum(p.numel() for p in made.parameters()) == count and made.layout.length == tokens
    parts = (made.encoder, made.quantizer, made.decoder)
    decoder = 237_117_187 if made.decoder.conv_in.out_channels == 1024 else 42_449_795
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        29_298_176,
        1_310_720,
        decoder,
    ]

"""ReToK: redundant tokens are copies that encoding and training see, prefixes decode, semantics fade with length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.interop.files import read_official
from tessellar.interop.importer import ImportOptions
from tessellar.layers.cnn_adaptive import AdaptiveGroupNorm, DepthToSpace
from tessellar.layers.qformer import QFormerLayer
from tessellar.networks.vision import Teacher, VisionModel
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.retok import Inferred, QFormerSize, ReToK, retok_s_b, retok_s_s
from tessellar.tokenizers.retok.official import OFFICIAL, to_official, tokenizer_from_official
from tessellar.tokenizers.retok.qformer import TokenEncoder, block_grid, pooled_queries

N, K, TOTAL = 16, 4, 28
VIT: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def make(seed: int = 0, **options: Any) -> ReToK:
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(32, 4, rotation=True)
    sizes: dict[str, Any] = {
        "encoder_size": QFormerSize(16, 1, 2),
        "decoder_size": QFormerSize(24, 2, 4),
    }
    made = ReToK(
        quantizer,
        8,
        N,
        K,
        32,
        (1, 1),
        1,
        8,
        **{**sizes, "semantic_dim": 24, "semantic_layer": 1, **options},
    )
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1 and "codebook" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def teacher() -> Teacher:
    model = VisionModel("test_vit", options=VIT)
    model.filled = True
    return Teacher(model)


def test_forward_is_decode_of_encode(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens, output = tokenizer.encode(images), tokenizer(images)
    assert tokenizer.layout == sequence_layout(N, Categorical(32), min_prefix=K)
    tokenizer.layout.check(tokens)
    assert torch.equal(tokens, output.tokens) and tokens.shape == (3, N)
    torch.testing.assert_close(tokenizer.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)


def test_a_prefix_is_decoded_from_itself_alone(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens = tokenizer.encode_all(images)
    assert torch.equal(tokens[:, :N], tokenizer.encode(images)) and tokens.shape == (3, TOTAL)
    with torch.no_grad():
        pictures = [tokenizer.decode(tokens[:, :k]) for k in (K, 9, N)] + [
            tokenizer.decode_all(tokens)
        ]
    assert all(
        float((a - b).abs().max()) > 1e-4 for a, b in zip(pictures, pictures[1:], strict=False)
    )
    for length in (K - 1, N + 1):
        with pytest.raises(ValueError, match="tokens have shape"):
            tokenizer.decode(tokens[:, :length])


def test_hidden_tokens_change_nothing(images: Tensor) -> None:
    """Masking by image equals slicing, for each length of a batch."""
    tokenizer = make().eval()
    vectors = tokenizer.quantizer.decode(tokenizer.encode_all(images))
    kept = torch.tensor([K, 11, TOTAL])
    masked = tokenizer.spread(vectors, torch.arange(TOTAL) < kept[:, None]).spatial
    for image, length in enumerate(kept.tolist()):
        sliced = tokenizer.spread(vectors[image : image + 1, :length]).spatial
        torch.testing.assert_close(masked[image : image + 1], sliced, atol=1e-5, rtol=0)


def test_redundant_queries_take_part_in_encoding(images: Tensor) -> None:
    tokenizer = make().eval()
    before = tokenizer.latents(tokenizer.encoder(images))
    with torch.no_grad():
        tokenizer.token_encoder.redundant_positions.add_(1)
    after = tokenizer.latents(tokenizer.encoder(images))
    assert not torch.allclose(before[:, :N], after[:, :N], atol=1e-3)


def test_every_position_starts_as_the_first_token() -> None:
    tokenizer = make().eval()
    vectors = torch.randn(1, N, 4)
    other = vectors.clone()
    other[:, 0] += 1
    with torch.no_grad():
        for layer in tokenizer.token_decoder.layers:
            assert isinstance(layer, QFormerLayer)
            layer.cross_attention.proj.weight.zero_()
    changed = (tokenizer.spread(vectors).spatial - tokenizer.spread(other).spatial).abs().amax(1)
    assert float(changed.min()) > 0
    later = vectors.clone()
    later[:, 1:] += 1
    assert torch.equal(tokenizer.spread(vectors).spatial, tokenizer.spread(later).spatial)


def test_groups_of_queries_are_averages_of_ever_finer_blocks() -> None:
    assert [h * w for h, w in map(block_grid, range(9))] == [1, 1, 2, 4, 8, 16, 32, 64, 128]
    assert block_grid(2) == (1, 2) and block_grid(3) == (2, 2)
    memory = torch.randn(2, 16, 5)
    queries, grid = pooled_queries(memory, 4, 16), memory.view(2, 4, 4, 5)
    assert queries.shape == (2, 16, 5)
    for index in (0, 1):
        torch.testing.assert_close(queries[:, index], memory.mean(1))
    torch.testing.assert_close(queries[:, 3], grid[:, :, 2:].mean((1, 2)))  # the right half
    torch.testing.assert_close(
        queries[:, 5], grid[:, :2, 2:].mean((1, 2))
    )  # the upper right quarter
    torch.testing.assert_close(queries[:, 9], grid[:, :2, 1].mean(1))  # the second of 2 x 4 blocks


def test_redundant_queries_are_copies() -> None:
    encoder = TokenEncoder(4, 16, 12, 8, QFormerSize(16, 1, 2), "auto")
    queries = encoder.queries(torch.randn(2, 16, 16))
    assert queries.shape == (2, 28, 16) and torch.equal(queries[:, 16:], queries[:, 4:16])


def test_nested_dropout_draws_the_lengths_that_it_says() -> None:
    tokenizer = make().train()
    drawn = tokenizer.draw_lengths(4000)
    counts = drawn.bincount(minlength=TOTAL + 1)[K:]
    assert int(drawn.min()) == K and int(drawn.max()) == TOTAL
    assert float(counts.min()) > 0.6 * 4000 / len(counts) and float(
        counts.max()
    ) < 1.5 * 4000 / len(counts)
    kept_last = float((drawn >= N).float().mean())  # without redundant tokens: 1 in 13
    assert abs(kept_last - 13 / 25) < 0.04
    multiples = make(inferred=Inferred(multiple=8, shortest=8, longest=N)).train().draw_lengths(200)
    assert set(multiples.tolist()) == {8, 16}
    assert len(make(inferred=Inferred(one_length=True)).train().draw_lengths(50).unique()) == 1
    for quiet in (make().eval(), make(inferred=Inferred(nested_dropout=False)).train()):
        assert set(quiet.draw_lengths(50).tolist()) == {N}


def test_training_hides_tokens_and_keeps_all_in_the_losses(images: Tensor) -> None:
    tokenizer = make(inferred=Inferred(shortest=K, longest=K)).train()
    output = tokenizer(images)
    torch.testing.assert_close(
        output.reconstruction, tokenizer.decode(output.tokens[:, :K]), atol=2e-5, rtol=0
    )
    latents = tokenizer.latents(tokenizer.encoder(images))
    assert latents.shape == (3, TOTAL, 4)
    torch.testing.assert_close(
        output.losses["codebook"], tokenizer.quantizer(latents).losses["codebook"]
    )


@pytest.mark.parametrize(
    ("schedule", "half"),
    [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)],
    ids=lambda x: str(x),
)
def test_semantic_weight_falls_from_k_to_n(schedule: Any, half: float) -> None:
    factor = make(inferred=Inferred(semantic_schedule=schedule)).semantic_factor
    first, middle, last, beyond = factor(torch.tensor([K, (K + N) // 2, N, TOTAL])).tolist()
    assert first == 1.0 and abs(middle - half) < 1e-6
    assert last == beyond == (1.0 if schedule == "constant" else pytest.approx(0.0, abs=1e-7))
    assert factor(torch.tensor([7])) >= factor(torch.tensor([8]))


def test_teacher_pulls_the_features_towards_its_own(images: Tensor, teacher: Teacher) -> None:
    tokenizer = make(
        teacher=teacher, semantic_weight=0.5, inferred=Inferred(shortest=K, longest=K)
    ).train()
    loss = tokenizer(images).losses["semantic"]
    features = tokenizer.spread(
        tokenizer.quantizer.decode(tokenizer.encode(images))[:, :K]
    ).semantic
    assert features is not None
    target = teacher(images).patches
    expected = 0.5 * (1 - torch.cosine_similarity(features, target, dim=-1)).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    head = tokenizer.token_decoder.semantic
    assert head is not None
    for parameter in (*tokenizer.encoder.conv_in.parameters(), *head.parameters()):
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0
    assert "semantic" not in tokenizer.eval()(images).losses
    full = make(teacher=teacher, inferred=Inferred(shortest=N, longest=N)).train()
    assert float(full(images).losses["semantic"].detach()) == 0.0


def test_feature_loss_stops(images: Tensor) -> None:
    tokenizer = make(feature_weight=2.0, feature_steps=2).train()
    losses = [float(tokenizer(images).losses["feature"].detach()) for _ in range(3)]
    assert losses[0] > 0 and losses[1] > 0 and losses[2] == 0.0
    assert "feature" not in make().train()(images).losses


def test_gradients_reach_every_parameter(images: Tensor, teacher: Teacher) -> None:
    tokenizer = make(
        teacher=teacher, feature_weight=1.0, inferred=Inferred(shortest=K, longest=K + 1)
    ).train()
    for _ in range(2):  # the redundant positions are read where the memory is long
        output = tokenizer(images)
        (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
        tokenizer.lengths = [TOTAL - 1, K]
    without = [
        n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not without


def test_the_second_stage_trains_the_decoders_alone(images: Tensor) -> None:
    tokenizer = make(stage="decoder").train()
    assert (
        not tokenizer.quantizer.training
        and not tokenizer.encoder.training
        and tokenizer.decoder.training
    )
    output = tokenizer(images)
    assert "codebook" not in output.losses
    output.reconstruction.square().mean().backward()
    trained = {n.split(".")[0] for n, p in tokenizer.named_parameters() if p.grad is not None}
    assert trained == {"token_decoder", "from_code", "decoder"}


def test_teacher_is_not_in_the_export(images: Tensor, teacher: Teacher, tmp_path: Path) -> None:
    tokenizer = make(teacher=teacher).eval()
    back = tessellar.load(export_tokenizer(tokenizer, tmp_path / "retok"))
    assert isinstance(back, ReToK) and back.teacher is None
    assert torch.equal(back.encode(images), tokenizer.encode(images))
    assert float(back.train()(images).losses["codebook"].detach()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9}, "stride 2 does not divide image_size 9"),
        ({"num_tokens": 12}, "num_tokens is 12"),
        ({"num_tokens": 64}, "num_tokens is 64"),
        ({"always": 16}, "always is 16"),
        ({"semantic_layer": 3}, "the decoder has 2 layers"),
        ({"inferred": Inferred(longest=99)}, "there are 28 with redundant ones"),
        ({"inferred": Inferred(multiple=64)}, "nested dropout keeps"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "image_size": 8,
        "num_tokens": N,
        "always": K,
        "multipliers": (1, 1),
        "channels": 32,
    }
    small = {
        "encoder_size": QFormerSize(16, 1, 2),
        "decoder_size": QFormerSize(16, 2, 2),
        "semantic_layer": 1,
    }
    with pytest.raises(ValueError, match=message):
        ReToK(VectorQuantizer(8, 4), **{**given, **small, "z_channels": 8, **options})


def test_teacher_of_another_width(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="semantic_dim is 32; the teacher's patches have 24"):
        make(teacher=teacher, semantic_dim=32)


@pytest.mark.parametrize(
    ("preset", "parameters", "without"),
    [(retok_s_s, 136_302_603, 129_481_995), (retok_s_b, 232_686_347, 218_523_659)],
)
def test_parameters_of_the_published_variants(preset: Any, parameters: int, without: int) -> None:
    with torch.device("meta"):
        made, plain = preset(), preset(semantic_dim=None)
    assert sum(p.numel() for p in made.parameters()) == parameters
    assert sum(p.numel() for p in plain.parameters()) == without
    assert made.layout == sequence_layout(256, Categorical(16384), 32) and made.redundant == 224


def test_sizes_are_told_by_the_weights(images: Tensor) -> None:
    tokenizer = make().eval()
    state = to_official(tokenizer)
    again = tokenizer_from_official(state, 2, 4, 1)
    assert again.state_dict().keys() == tokenizer.state_dict().keys()
    assert again.config["init_args"] == {**tokenizer.config["init_args"], "semantic_layer": 1}
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    without = {k: v for k, v in state.items() if "distill_mlp" not in k}
    bare = tokenizer_from_official({**without, "quantize.codebook_used": torch.zeros(3)}, 2, 4)
    assert bare.token_decoder.semantic is None and torch.equal(
        bare.encode(images), tokenizer.encode(images)
    )
    with pytest.raises(UserError, match="width 24: give --num_heads"):
        OFFICIAL.build(state, ImportOptions())


def test_import_prefers_the_entry_that_is_asked_for(tmp_path: Path) -> None:
    official = to_official(make())
    torch.save(
        {"model": official, "ema": {k: v + 1 for k, v in official.items()}, "steps": 3},
        tmp_path / "vq.pt",
    )
    name = "encoder.conv_in.bias"
    assert torch.equal(read_official(tmp_path / "vq.pt", "ema")[name], official[name] + 1)
    imported = import_model(
        "retok", str(tmp_path / "vq.pt"), key="ema", options=ImportOptions(num_heads=2)
    )
    assert isinstance(imported, ReToK) and torch.equal(
        imported.encoder.conv_in.bias, official[name] + 1
    )  # type: ignore[arg-type]
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not the weights of a ReToK tokenizer"):
        import_model("retok", str(tmp_path / "other.safetensors"))


def test_depth_to_space_orders_channels_by_pixel_first() -> None:
    layer = DepthToSpace(2)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.copy_(torch.arange(8.0))  # type: ignore[union-attr]
    out = layer(torch.zeros(1, 2, 1, 1))
    assert out[0, 0].tolist() == [[0, 2], [4, 6]] and out[0, 1].tolist() == [[1, 3], [5, 7]]


def test_adaptive_norm_takes_its_statistics_from_the_style() -> None:
    layer, style, x = AdaptiveGroupNorm(32, 3), torch.randn(2, 3, 4, 4), torch.randn(2, 32, 4, 4)
    shift, scale = (
        layer.beta(style.mean((2, 3))),
        layer.gamma(style.flatten(2).std(-1, correction=1)),
    )
    normed = (x - x.mean((2, 3), keepdim=True)) / x.flatten(2).std(-1, correction=0)[
        ..., None, None
    ]
    expected = normed * scale[..., None, None] + shift[..., None, None]
    torch.testing.assert_close(layer(x, style), expected, atol=1e-4, rtol=1e-4)

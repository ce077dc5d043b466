"""FlexTok: prefixes of tokens and registers, guided drawing seeded by image, what a training pass hides and learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.networks.vision import Teacher, VisionModel
from tessellar.processes.apg import APG
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.tokenizers.flextok import (
    FlexTok,
    FlowDecoding,
    FlowTraining,
    TransformerSize,
    flextok_d12_d12,
    flextok_d18_d18,
    flextok_d18_d28,
)
from tessellar.tokenizers.flextok.official import from_official, read_config, to_official
from tessellar.tokenizers.flextok.official_vae import to_official as vae_to_official
from tessellar.tokenizers.flextok.transformer import positions_2d, prefix_mask
from tessellar.tokenizers.flextok.vae import flextok_vae
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.fsq import FSQ

N, SIDE, LEVELS = 8, 8, (8, 5, 5)
GOLDEN = Path(__file__).parents[1] / "golden" / "flextok"


def make(seed: int = 0, **options: Any) -> FlexTok:
    """Pixels in patches of 2, with weights that are not zero anywhere."""
    torch.manual_seed(seed)
    sizes = {"encoder_size": TransformerSize(16, 2, 8), "decoder_size": TransformerSize(24, 2, 8)}
    settings = {
        "decoding": FlowDecoding(3, 2.0, APG()),
        "training_settings": FlowTraining(null=0.0),
    }
    made = FlexTok(FSQ(LEVELS), SIDE, N, **{**sizes, **settings, **options})
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1.0 if name == "encoder.registers" else 0.2)
    return made


def small_vae(seed: int = 0) -> KLVAE:
    torch.manual_seed(seed)
    return flextok_vae(4, SIDE, scale=0.5, widths=(8, 16), num_res_blocks=1, groups=4)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def teacher() -> Teacher:
    options: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = VisionModel("test_vit", options=options)
    model.filled = True
    return Teacher(model)


@pytest.mark.parametrize("latent", [False, True], ids=["pixels", "latents"])
def test_forward_is_decode_of_encode(images: Tensor, latent: bool) -> None:
    tokenizer = make(vae=small_vae() if latent else None).eval()
    tokens, output = tokenizer.encode(images), tokenizer(images)
    assert tokenizer.layout == sequence_layout(N, Categorical(200), min_prefix=1)
    tokenizer.layout.check(tokens)
    assert torch.equal(tokens, output.tokens) and output.losses == {}
    assert torch.equal(tokenizer.decode(tokens), output.reconstruction)
    assert output.reconstruction.shape == images.shape and tokens.unique().numel() > 8


def test_fewer_registers_give_the_first_tokens(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens = tokenizer.encode(images)
    for length in (1, 3, N):
        assert torch.equal(tokenizer.encode(images, length), tokens[:, :length])
    with pytest.raises(ValueError, match="length is 9"):
        tokenizer.encode(images, N + 1)


def test_registers_see_patches_and_their_past() -> None:
    mask = prefix_mask(3, 2).int().tolist()
    assert mask == [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_positions_of_a_smaller_grid_are_the_corner_of_the_table(images: Tensor) -> None:
    table = positions_2d(4, 8)
    assert torch.equal(table[..., :2, :2], positions_2d(2, 8))
    assert table[0, 0, 1, 3] == table[0, 4, 3, 1] != table[0, 0, 3, 1]  # rows first, then columns
    wide, narrow = make(table=6).eval(), make().eval()
    state = {k: t for k, t in wide.state_dict().items()}
    state |= {k: t[..., :4, :4] for k, t in state.items() if k.endswith("embed.table")}
    narrow.load_state_dict(state)
    assert torch.equal(wide.encode(images), narrow.encode(images))


def test_hidden_tokens_change_nothing(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens, start, kept = (
        tokenizer.encode(images),
        torch.randn(3, 3, SIDE, SIDE),
        torch.tensor([1, 4, N]),
    )
    first = tokenizer.denoise(tokens, start, lengths=kept)
    other = torch.where(torch.arange(N) < kept[:, None], tokens, (tokens + 1) % 200)
    assert torch.equal(first, tokenizer.denoise(other, start, lengths=kept))
    for image, length in enumerate(kept.tolist()):
        alone = tokenizer.denoise(tokens[image : image + 1, :length], start[image : image + 1])
        torch.testing.assert_close(first[image : image + 1], alone, atol=1e-5, rtol=1e-5)
    assert float((first[0] - tokenizer.denoise(tokens, start)[0]).abs().max()) > 1e-3


def test_the_null_condition_hides_every_token(images: Tensor) -> None:
    for null in ("learned", "zero"):
        decoder = make(null=null).decoder
        codes, yes = torch.randn(2, 2, N, 3), torch.ones(2, dtype=torch.bool)
        a, b = (decoder.condition(c, torch.tensor([3, N]), yes) for c in codes)
        assert torch.equal(a, b) and bool((a == 0).all()) == (null == "zero")
    mixed = decoder.condition(codes[0], torch.tensor([3, N]), torch.tensor([True, False]))
    assert bool((mixed[0] == 0).all()) and torch.equal(
        mixed[1], decoder.condition(codes[0], torch.tensor([3, N]))[1]
    )


def test_the_mask_token_replaces_the_position(images: Tensor) -> None:
    decoder = make().decoder
    registers = decoder.condition(torch.randn(1, 5, 3), torch.tensor([3]))[0]
    assert torch.equal(registers[3:], decoder.mask_token.expand(N - 3, -1)) and len(registers) == N


def test_a_new_decoder_leaves_the_noise_as_it_is(images: Tensor) -> None:
    sizes: dict[str, Any] = {
        "encoder_size": TransformerSize(16, 1, 8),
        "decoder_size": TransformerSize(24, 2, 8),
    }
    tokenizer = FlexTok(FSQ(LEVELS), SIDE, N, **sizes).eval()
    noise = Noise([3, 4, 5]).normal(3, SIDE, SIDE)
    drawn = tokenizer.decode(tokenizer.encode(images), noise=Noise([3, 4, 5]))
    assert torch.equal(drawn, noise)


def test_decoding_takes_steps_guidance_and_noise(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens = tokenizer.encode(images)
    pictures = [
        tokenizer.decode(tokens),
        tokenizer.decode(tokens, steps=5),
        tokenizer.decode(tokens, guidance=1.0),
        tokenizer.decode(tokens, guidance=lambda t: 4.0 if t > 0.5 else 1.5),
        tokenizer.decode(tokens, noise=Noise([7, 8, 9])),
    ]
    for index, picture in enumerate(pictures):
        assert all(float((picture - other).abs().max()) > 1e-3 for other in pictures[:index])
    torch.testing.assert_close(tokenizer.decode(tokens, guidance=lambda _: 2.0), pictures[0])
    tokenizer.decoding = FlowDecoding(3, 1.0)
    assert torch.equal(tokenizer.decode(tokens), pictures[2])
    with pytest.raises(ValueError, match="noise has 2 streams for 3 images"):
        tokenizer.decode(tokens, noise=Noise([0, 1]))
    with pytest.raises(ValueError, match="lengths are"):
        tokenizer.decode(tokens[:, :2], lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(UserError, match="steps of the flow decoder is 0"):
        tokenizer.decode(tokens, steps=0)


def test_plain_guidance_is_linear_in_the_scale(images: Tensor) -> None:
    tokenizer = make(decoding=FlowDecoding(1, 1.0, None)).eval()
    tokens, start = tokenizer.encode(images), torch.randn(3, 3, SIDE, SIDE)
    one, two, four = (tokenizer.denoise(tokens, start, guidance=scale) for scale in (1.0, 2.0, 4.0))
    torch.testing.assert_close(four - one, 3 * (two - one), atol=1e-4, rtol=1e-4)
    assert float((two - one).abs().max()) > 1e-3


def test_an_image_depends_on_its_own_tokens_and_seed(images: Tensor) -> None:
    tokenizer = make().eval()
    tokens = tokenizer.encode(images)
    together = tokenizer.decode(tokens)
    assert torch.equal(together, tokenizer.decode(tokens))
    for image in range(3):
        alone = tokenizer.decode(tokens[image : image + 1])
        torch.testing.assert_close(together[image : image + 1], alone, atol=5e-5, rtol=5e-5)
    seeded = tokenizer.decode(tokens, noise=Noise([5, 6, 7]))
    alone = tokenizer.decode(tokens[1:2], noise=Noise([6]))
    torch.testing.assert_close(seeded[1:2], alone, atol=5e-5, rtol=5e-5)


def test_lengths_of_nested_dropout() -> None:
    torch.manual_seed(0)
    assert sorted(FlowTraining("pow2").draw_lengths(500, 16).unique().tolist()) == [1, 2, 4, 8, 16]
    assert sorted(FlowTraining("pow2").draw_lengths(500, 12).unique().tolist()) == [1, 2, 4, 8, 12]
    rounded = FlowTraining("uniform_pow2").draw_lengths(4000, 16)
    assert (
        abs(float((rounded == 16).float().mean()) - 0.5) < 0.04
        and 0.03 < float((rounded == 1).float().mean()) < 0.1
    )
    assert len(FlowTraining("uniform").draw_lengths(500, 16).unique()) == 16
    assert FlowTraining("all").draw_lengths(9, 16).unique().tolist() == [16]


def test_training_estimates_the_image_in_one_step(images: Tensor) -> None:
    tokenizer = make().train()
    torch.manual_seed(0)
    output = tokenizer(images)
    assert set(output.losses) == {"flow"} and output.tokens.shape == (3, N)
    loss = output.losses["flow"]
    assert abs(float(loss.detach()) - float(_flow_again(tokenizer, images))) < 1e-4
    output.reconstruction.square().mean().backward()
    assert tokenizer.decoder.head.weight.grad is not None


def _flow_again(tokenizer: FlexTok, images: Tensor) -> Tensor:
    """The loss from the estimate: x_t - t v - x = t ((noise - x) - v)."""
    torch.manual_seed(0)
    estimate = tokenizer(images).reconstruction.detach()
    torch.manual_seed(0)
    t = tokenizer.training_settings.times.draw(len(images))
    return ((estimate - images) / t.view(-1, 1, 1, 1)).square().mean()


def test_gradients_reach_every_parameter(images: Tensor, teacher: Teacher) -> None:
    settings = FlowTraining(lengths="pow2", null=0.3)
    tokenizer = make(
        teacher=teacher, repa_dim=24, vae=small_vae(), training_settings=settings
    ).train()
    torch.manual_seed(2)
    many = images.repeat(8, 1, 1, 1)
    sum(tokenizer(many).losses.values()).backward()  # type: ignore[union-attr]
    trained = {n: p for n, p in tokenizer.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not any(n.startswith("vae.") or n.endswith("table") for n in trained)


def test_the_vae_is_frozen_and_its_reconstruction_is_not_rendered(images: Tensor) -> None:
    tokenizer = make(vae=small_vae()).train()
    assert tokenizer.vae is not None and not tokenizer.vae.training
    assert bool(tokenizer(images).reconstruction.isnan().all())
    expected = small_vae().eval().encode(images)
    assert torch.equal(tokenizer.latents(images).flatten(2).transpose(1, 2), expected)
    assert not torch.equal(
        tokenizer.latents(images, sample=True), tokenizer.latents(images, sample=True)
    )
    torch.testing.assert_close(
        tokenizer.render(tokenizer.latents(images)), small_vae().decode(expected)
    )


def test_repa_pulls_the_features_towards_the_teacher(images: Tensor, teacher: Teacher) -> None:
    settings = FlowTraining("all", null=0.0, repa_weight=0.5)
    tokenizer = make(teacher=teacher, repa_dim=24, training_settings=settings).train()
    assert 0 < float(tokenizer(images).losses["repa"].detach()) < 1
    features = torch.randn(3, 16, 24)
    assert tokenizer.repa is not None
    with torch.no_grad():
        for layer in tokenizer.repa[:-1]:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.zero_()
        last = tokenizer.repa[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight.zero_()
        last.bias.copy_(teacher(images).patches[0, 0])
    first = 1 - torch.cosine_similarity(
        teacher(images).patches, teacher(images).patches[:1, :1], dim=-1
    ).mean(1)
    torch.testing.assert_close(
        tokenizer.repa_distance(features, images), first, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="repa_dim is 32; the teacher's patches have 24"):
        make(teacher=teacher, repa_dim=32)


def test_export_holds_the_vae_and_not_the_teacher(
    images: Tensor, teacher: Teacher, tmp_path: Path
) -> None:
    tokenizer = make(teacher=teacher, repa_dim=24, vae=small_vae(), null="zero").eval()
    back = tessellar.load(export_tokenizer(tokenizer, tmp_path / "flextok"))
    assert (
        isinstance(back, FlexTok) and back.teacher is None and back.decoding == tokenizer.decoding
    )
    tokens = tokenizer.encode(images)
    assert torch.equal(back.encode(images), tokens) and torch.equal(
        back.decode(tokens), tokenizer.decode(tokens)
    )


def test_a_vae_takes_weights_of_an_export_or_of_diffusers(images: Tensor, tmp_path: Path) -> None:
    vae, sizes = small_vae(5), {"widths": (8, 16), "num_res_blocks": 1, "groups": 4}
    folder = export_tokenizer(vae, tmp_path / "vae")
    save_file(vae_to_official(vae), tmp_path / "official.safetensors")
    ours = flextok_vae(4, SIDE, weights=str(folder), **sizes)
    theirs = flextok_vae(
        4, SIDE, scale=2.0, weights=str(tmp_path / "official.safetensors"), **sizes
    )
    assert torch.equal(ours.encode(images), vae.encode(images))
    torch.testing.assert_close(theirs.encode(images), 4 * vae.encode(images))
    export_tokenizer(make(), tmp_path / "other")
    with pytest.raises(UserError, match="FlexTok's VAE is a KLVAE"):
        flextok_vae(4, SIDE, weights=str(tmp_path / "other"), **sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide maps of 8x8"),
        ({"table": 3}, "table is 3; there are 4x4 patches"),
        ({"tap": 2}, "the tapped block is 2; the decoder has 2"),
        ({"vae": "small", "image_size": 16}, "the VAE gives 4x4 latents"),
        ({"num_tokens": 0}, "at least 1 token"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {
        "encoder_size": TransformerSize(16, 1, 8),
        "decoder_size": TransformerSize(16, 2, 8),
    }
    given = {"image_size": SIDE, "num_tokens": N, **sizes, **options}
    if "vae" in given:
        given["vae"] = small_vae()
    with pytest.raises(ValueError, match=message):
        FlexTok(FSQ(LEVELS), **given)


def test_widths_lengths_and_images_that_do_not_fit(images: Tensor) -> None:
    with pytest.raises(ValueError, match="multiple of 4 and of head_dim 64"):
        TransformerSize(96, 2)
    with pytest.raises(ValueError, match="lengths is 'half'"):
        FlowTraining("half")  # type: ignore[arg-type]
    tokenizer = make()
    with pytest.raises(ValueError, match="this tokenizer needs"):
        tokenizer.encode(images[..., :6])
    for tokens in (torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, N + 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="tokens have shape"):
            tokenizer.decode(tokens)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode(torch.tensor([[200]]))


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder"),
    [
        (flextok_d12_d12, 85_382_406, 172_448_320),
        (flextok_d18_d18, 287_326_086, 578_587_456),
        (flextok_d18_d28, 287_326_086, 2_169_735_744),
    ],
)
def test_parameters_of_the_published_variants(preset: Any, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        made = preset()
    counts = [
        sum(p.numel() for p in part.parameters())
        for part in (made.encoder, made.decoder, made.vae, made)
    ]
    assert counts == [encoder, decoder, 83_821_011, encoder + decoder + 83_821_011]
    assert f"{counts[-1]:,} parameters" in str(preset.__doc__)
    assert made.layout == sequence_layout(256, Categorical(64000), 1) and made.grid.patches == 16


@pytest.mark.parametrize(("channels", "count"), [(4, 83_653_863), (8, 83_709_419)])
def test_parameters_of_the_vae(channels: int, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in flextok_vae(channels).parameters()) == count


@pytest.fixture(scope="module")
def official() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(GOLDEN / "weights.safetensors"), json.loads(
        (GOLDEN / "meta.json").read_text()
    )["config"]


def test_export_to_official_is_the_inverse_of_import(
    official: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    state, config = official
    back = to_official(from_official(state, config), config)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_the_config_is_read_from_beside_the_weights_or_from_within(
    official: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    state, config = official
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    with pytest.raises(UserError, match="not the config of a FlexTok tokenizer: vae, encoder"):
        import_model("flextok", str(file))
    save_file(state, file, {key: str(value) for key, value in config.items()})
    assert read_config(file) == config
    made = import_model("flextok", str(file))
    assert (
        isinstance(made, FlexTok)
        and made.image_size == (64, 64)
        and made.training_settings.null == 0.1
    )
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "regularizer": {"levels": [5] * 6}})
    )
    other = import_model("flextok", str(file))
    assert isinstance(other, FlexTok) and other.layout.vocab()[0] == 5**6


def test_config_and_weights_that_contradict(
    official: tuple[dict[str, Tensor], dict[str, Any]],
) -> None:
    state, config = official
    with pytest.raises(UserError, match="does not fit FlexTok"):
        from_official(state, {**config, "regularizer": {"levels": [8, 8, 8]}})
    renamed = {key.replace("enc_transformer", "trunk"): tensor for key, tensor in state.items()}
    with pytest.raises(UserError, match="unknown: encoder.module_dict.trunk"):
        from_official(renamed, config)
    modules = config["encoder"]["module_dict"]
    moved = {
        ("trunk" if name == "enc_transformer" else name): entry for name, entry in modules.items()
    }
    made = from_official(
        renamed, {**config, "encoder": {**config["encoder"], "module_dict": moved}}
    )
    assert len(made.encoder.blocks) == 3
    without = {name: entry for name, entry in modules.items() if name != "enc_register_module"}
    with pytest.raises(UserError, match="encoder has no Registers1D"):
        from_official(state, {**config, "encoder": {**config["encoder"], "module_dict": without}})

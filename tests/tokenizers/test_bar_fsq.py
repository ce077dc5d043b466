"""BAR's tokenizer: where its quantizer's threshold is, bits of any number, both directions, SigLIP2's tower."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.networks.vision import Teacher, VisionModel
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Bits, grid_layout
from tessellar.tokenizers.bar_fsq import BARFSQ, bar_fsq_256, bar_fsq_512
from tessellar.tokenizers.bar_fsq.official import from_official, to_official
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ
from tessellar.training.optim import OptimizerSettings
from tests.tiny.bar_by_official_names import decoded, encoded

TOWER = {
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "class_token": False,
    "global_pool": "",
}


def slope(quantizer: BinaryFSQ, at: float) -> float:
    z = torch.full((1, quantizer.dim), at, requires_grad=True)
    quantizer.train()(z).quantized.sum().backward()
    assert z.grad is not None
    return float(z.grad[0, 0])


def test_the_published_threshold_is_far_below_zero() -> None:
    """z = 0 is 1, with hardly a gradient; the threshold is -3.80, where the slope is 1."""
    published = BinaryFSQ(3, centred=False)
    z = torch.tensor([[0.0, -3.81, -3.79]])
    assert published.encode(z).tolist() == [[1, 0, 1]]
    assert published.decode(published.encode(z)).tolist() == [[1.0, -1.0, 1.0]]
    assert slope(published, 0.0) == pytest.approx(0.001999, abs=2e-6)
    assert slope(published, -3.800701) == pytest.approx(1.001, abs=1e-3)
    centred = BinaryFSQ(3)
    assert centred.encode(torch.tensor([[0.1, -0.1, 0.0]])).tolist() == [[1, 0, 1]]
    assert slope(centred, 0.0) == pytest.approx(1.0)


def test_bits_are_no_index() -> None:
    """256 bits: no integer would hold them."""
    made = BinaryFSQ(256)
    z = torch.randn(2, 5, 256)
    tokens = made.encode(z)
    assert made.kind == Bits(256) and tokens.shape == z.shape
    assert torch.equal(made.decode(tokens), torch.where(z >= 0, 1.0, -1.0))
    with pytest.raises(ValueError, match="at least one bit"):
        BinaryFSQ(0)


def small(**options: object) -> BARFSQ:
    torch.manual_seed(0)
    sizes = (16, 4, 24, 2, 3, 2.0, 32, 3, 2)
    return BARFSQ(BinaryFSQ(5), *sizes, **options)  # type: ignore[arg-type]


def test_forward_is_decode_of_encode_and_gradients_reach_every_parameter() -> None:
    made = small().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = made(images)
    tokens = made.encode(images)
    assert made.layout == grid_layout(4, 4, Bits(5))
    made.layout.check(tokens)
    assert torch.equal(tokens, output.tokens) and len(tokens.unique()) == 2
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)
    made.train()(images).reconstruction.square().mean().backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    again = build(made.config)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.eval().encode(images), tokens)


def tower() -> VisionModel:
    torch.manual_seed(1)
    made = VisionModel("vit_tiny_patch16_224", image_size=16, options=TOWER)
    made.filled = True  # its random weights are the tower's
    return made


def test_the_encoder_starts_as_the_tower_and_is_kept_near_it(tmp_path: Path) -> None:
    """The tower in a file: the encoder gives its features; its patch embeddings stay; the teacher is not exported."""
    vision = tower()
    state = {name: tensor.contiguous() for name, tensor in vision.network.state_dict().items()}
    save_file(state, tmp_path / "tower.safetensors")
    torch.manual_seed(0)
    made = BARFSQ(
        BinaryFSQ(5), 16, 4, 24, 2, 3, 4.0, 32, 3, 2,
        tower=str(tmp_path / "tower.safetensors"),
        teacher=Teacher(vision),
    )  # fmt: skip
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_in.weight", "patch_in.bias", "positions"}
    for name in ("encoder.1.fc2.weight", "encoder_norm.bias"):
        theirs = name.replace("encoder.1.fc2", "blocks.1.mlp.fc2").replace("encoder_norm", "norm")
        assert torch.equal(made.state_dict()[name], state[theirs])
    patches = torch.nn.functional.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4
    )
    found: Tensor = made.patch_in(
        images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    )
    torch.testing.assert_close(found, patches.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)
    losses = made.train()(images).losses
    assert set(losses) == {"alignment"} and float(losses["alignment"].detach()) > 0
    assert made.config["init_args"]["tower"] is None and made.config["init_args"]["teacher"] is None
    assert made.eval()(images).losses == {}


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="patches of 5 do not divide images of 16"):
        BARFSQ(BinaryFSQ(4), 16, 5)
    with pytest.raises(UserError, match="the teacher's features have 24 channels, the encoder 32"):
        BARFSQ(BinaryFSQ(4), 16, 4, 32, 1, 2, teacher=Teacher(tower()))


def test_published_layouts() -> None:
    with torch.device("meta"):
        assert bar_fsq_256().layout == grid_layout(16, 16, Bits(16))
        assert bar_fsq_512().layout == grid_layout(32, 32, Bits(10))
        assert sum(p.numel() for p in bar_fsq_256().encoder_norm.parameters()) == 2304


def published() -> BARFSQ:
    """The presets' kind, small: the published quantizer, a norm in front of the decoder."""
    torch.manual_seed(0)
    made = BARFSQ(
        BinaryFSQ(5, centred=False), 16, 4, 24, 2, 3, 2.0, 32, 3, 2, norm_in=True, decoder_eps=1e-5
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.constant_(made.to_code.bias, -3.8)  # the threshold: both values occur
    return made.eval()


def official_file(made: BARFSQ) -> dict[str, Tensor]:
    """What lies in a published file: also the untouched tower, twice, and the layers of the alignment."""
    state = to_official(made)
    tower = {n.split("layers.")[1]: t for n, t in state.items() if "trainable_encoder" in n}
    for name, tensor in tower.items():
        for place in ("siglip.encoder", "frozen_encoder"):
            state[f"encoder.{place}.layers.{name}"] = tensor * 2
    for place in ("siglip.post_layernorm", "frozen_post_layernorm"):
        state[f"encoder.{place}.weight"] = torch.ones(24)
    state["encoder.siglip.head.probe"] = torch.ones(1, 1, 24)
    state["decoder.clip_projector.0.weight"] = torch.ones(8, 32)
    return state


def test_a_published_file_gives_the_tokenizer_back() -> None:
    made = published()
    state = official_file(made)
    again = from_official(state, heads=(3, 2))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(again.encode(images), made.encode(images))
    assert len(made.encode(images).unique()) == 2
    tokens = torch.randint(2, (2, 16, 5))
    assert torch.equal(again.decode(tokens), made.decode(tokens))
    assert again.config["init_args"]["decoder_eps"] == 1e-5
    assert {name.partition("transformer.1.")[2] for name in state if "transformer.1." in name} == {
        f"{layer}.{tensor}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for tensor in ("weight", "bias")
    }
    assert state["decoder.class_embedding"].shape == (1, 32)
    assert state["decoder.ffn.0.weight"].shape == (48, 32, 1, 1)
    layer = "encoder.trainable_encoder.layers.1.self_attn"
    q, k, v = made.encoder[1].qkv.weight.chunk(3)  # type: ignore[union-attr, operator]
    for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        assert torch.equal(state[f"{layer}.{name}.weight"], part)
    del state[f"{layer}.k_proj.bias"]
    with pytest.raises(UserError, match="not the other two"):
        from_official(state, heads=(3, 2))
    with pytest.raises(UserError, match="no published BAR-FSQ has width 24: give --num-heads"):
        from_official(official_file(made))


def test_positions_of_the_tower_are_resized_to_the_decoders_grid() -> None:
    """The 512-pixel tokenizer: a table of 16 x 16 in the file, 32 x 32 patches; here 2 x 2 and 4 x 4."""
    state = official_file(published())
    small_table = torch.arange(4.0)[:, None].expand(4, 24).clone()
    state["encoder.siglip.embeddings.position_embedding.weight"] = small_table
    found = from_official(state, heads=(3, 2)).positions.detach()[0, :, 0].view(4, 4)
    assert float(found[0, 0]) == 0.0 and float(found[3, 3]) == 3.0
    assert bool((found.diff(dim=0) >= 0).all()) and bool((found.diff(dim=1) >= 0).all())


def test_the_presets_are_as_published_and_have_their_sizes() -> None:
    with torch.device("meta"):
        made = bar_fsq_256()
        assert isinstance(made.norm_in, nn.LayerNorm) and made.norm_in.eps == 1e-5
        assert made.decoder[0].mlp_norm.eps == 1e-5 and made.encoder[0].mlp_norm.eps == 1e-6  # type: ignore[union-attr, operator]
        assert made.encoder[0].fc1.out_features == 4304  # type: ignore[union-attr, operator]
        layer = 4 * 1152**2 + 2 * 1152 * 4304 + 9 * 1152 + 4304  # matrices; biases and norms
        tower = 768 * 1152 + 1152 + 256 * 1152 + 27 * layer + 2 * 1152
        block = 12 * 1024**2 + 13 * 1024
        decoder = 257 * 1024 + 1024 + 24 * block + 4 * 1024 + 1024 * 768 + 768 + 84
        codes = 1152 * 16 + 16 + 16 * 1024 + 1024
        assert sum(p.numel() for p in made.parameters()) == tower + decoder + codes == 716_050_516


def test_the_published_decoder_starts_as_officially() -> None:
    torch.manual_seed(0)
    made = BARFSQ(BinaryFSQ(5), 16, 4, 24, 1, 2, 2.0, 64, 1, 2, norm_in=True)
    assert float(made.decoder_positions.detach().std()) == pytest.approx(64**-0.5, rel=0.1)
    assert float(made.smooth.weight.detach().abs().max()) <= 2.0 and not made.smooth.bias.any()  # type: ignore[union-attr]
    assert float(made.smooth.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    plain = BARFSQ(BinaryFSQ(5), 16, 4, 24, 1, 2, 2.0, 64, 1, 2)
    assert float(plain.decoder_positions.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_the_encoder_has_a_rate_of_its_own() -> None:
    made = small()
    slow = OptimizerSettings(lr=1.0, weight_decay=0.5, encoder_rate=0.1).make(made)[0]
    of_rate = {0.1: set(), 1.0: set()}
    for group in slow.param_groups:
        of_rate[round(group["lr"], 6)] |= {id(parameter) for parameter in group["params"]}
        assert group["weight_decay"] in (0.0, 0.5)
    encoder = {id(p) for part in (made.encoder, made.encoder_norm) for p in part.parameters()}
    assert of_rate[0.1] == encoder
    assert of_rate[1.0] == {id(p) for p in made.parameters()} - encoder
    with pytest.raises(ValueError, match="encoder_rate is 0"):
        OptimizerSettings(encoder_rate=0.0)


@torch.no_grad()
def test_both_ways_compute_what_the_official_tensors_say() -> None:
    made = published()
    state = to_official(made)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    tokens = made.encode(images)
    assert torch.equal(encoded(state, images, heads=3), tokens) and len(tokens.unique()) == 2
    torch.testing.assert_close(made.decode(tokens), decoded(state, tokens, heads=2))

"""AliTok's own promises: a causal decoder, a strip drawn by the prefix, a second stage that goes on from the first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.reading import init_tokenizer
from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.tokenizers.alitok import AliTok, alitok_256
from tessellar.tokenizers.alitok.official import OFFICIAL, from_official, to_official
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.titok import ViTSize

ENCODER, DECODER = ViTSize(32, 2, 4), ViTSize(24, 2, 2)
PREFIX, SIDE = 5, 4


def make(stage: Any, seed: int = 0, **options: Any) -> AliTok:
    torch.manual_seed(seed)
    made = AliTok(
        ClusteringVQ(24, 5),
        16,
        patch_size=4,
        encoder_size=ENCODER,
        decoder_size=DECODER,
        stage=stage,
        buffer=3,
        **options,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("stage", ["causal", "bidirectional"])
def test_forward_is_decode_of_encode(stage: str, images: Tensor) -> None:
    tokenizer = make(stage).eval()
    kind = Categorical(24)
    prefix, patches = Segment((PREFIX,), kind, "prefix"), Segment((SIDE, SIDE), kind, "patches")
    assert tokenizer.layout == Layout((prefix, patches))
    output = tokenizer(images)
    assert torch.equal(tokenizer.encode(images), output.tokens)
    torch.testing.assert_close(
        tokenizer.decode(output.tokens), output.reconstruction, atol=2e-5, rtol=0
    )
    assert float(output.reconstruction.detach().abs().max()) <= 1


@torch.no_grad()
def test_a_token_of_the_causal_decoder_changes_no_patch_before_its_own() -> None:
    """Bit for bit; with full attention the same token changes the first patch."""
    tokens = torch.randint(24, (1, PREFIX + SIDE**2), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, PREFIX + 6] = (changed[0, PREFIX + 6] + 7) % 24  # of row 1, column 2
    causal = make("causal").eval()
    before = causal.decode(tokens)
    after = causal.decode(changed)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert torch.equal(before[:, :, 4:8, :8], after[:, :, 4:8, :8])
    assert not torch.allclose(before[:, :, 4:8, 8:12], after[:, :, 4:8, 8:12])
    full = make("bidirectional").eval()
    assert not torch.equal(full.decode(tokens)[:, :, :4, :4], full.decode(changed)[:, :, :4, :4])


def test_the_prefix_learns_the_first_patch_and_then_the_first_row(images: Tensor) -> None:
    tokenizer = make("causal", prefix_weight=2.0).eval()
    strip = tokenizer.strip_of(images)
    assert strip.shape == (3, 3, 4, 4 * PREFIX)
    assert torch.equal(strip[..., :4], strip[..., 4:8])
    assert torch.equal(2 * strip[..., 4:] - 1, images[:, :, :4])
    states = tokenizer.decoder(tokenizer.quantizer(tokenizer.latents(images)).quantized)
    expected = 2.0 * F.mse_loss(tokenizer.draw_strip(states), strip)
    torch.testing.assert_close(tokenizer(images).losses["prefix"], expected)
    assert make("causal").prefix_weight == pytest.approx(10 * 5 / 16)
    with pytest.raises(UserError, match='draws a strip in stage "causal" alone'):
        make("bidirectional").draw_strip(states)


def test_the_second_stage_trains_what_draws_and_nothing_else(images: Tensor) -> None:
    tokenizer = make("bidirectional").train()
    codes = tokenizer.quantizer.state_dict()
    output = tokenizer(images)
    assert output.losses == {}
    output.reconstruction.square().mean().backward()
    moved = {name.split(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert moved == {"decoder", "head"}
    after = tokenizer.quantizer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in codes.items())


def test_the_second_stage_starts_from_the_first(images: Tensor, tmp_path: Path) -> None:
    first = make("causal", seed=1).eval()
    folder = export_tokenizer(first, tmp_path / "first")
    second = make("bidirectional", seed=2).eval()
    own = {
        name: second.state_dict()[name].clone() for name in ("decoder.first", "decoder.positions")
    }
    init_tokenizer(folder, second)
    assert torch.equal(second.encode(images), first.encode(images))
    state = second.state_dict()
    theirs = first.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, own[name] if name in own else theirs[name]), name
    again = make("bidirectional", seed=3)
    init_tokenizer(export_tokenizer(second, tmp_path / "second"), again)
    assert torch.equal(again.decoder.first, second.decoder.first)


def test_published_sizes() -> None:
    with torch.device("meta"):
        made = {stage: alitok_256(stage) for stage in ("causal", "bidirectional")}
    counts = {stage: sum(p.numel() for p in t.parameters()) for stage, t in made.items()}
    assert counts == {"causal": 390_623_032, "bidirectional": 389_899_308}
    assert made["causal"].layout.length == 273


def test_files_of_both_kinds_are_imported(images: Tensor, tmp_path: Path) -> None:
    """The published file is the state dict, a training file has it in an entry; heads must be given."""
    made = make("bidirectional").eval()
    state = to_official(made)
    assert not any(key.startswith("strip") for key in state)
    save_file(state, tmp_path / "AliTok.safetensors")
    torch.save(
        {"model_state": state, "criterion_state": {}, "start_step": 3}, tmp_path / "last.pth"
    )
    flat = OFFICIAL.read(state, "AliTok.pth")
    nested = OFFICIAL.read({"model_state": state, "start_step": 3}, "last.pth")
    for found in (flat, nested):
        again = from_official(found, (4, 2))
        assert torch.equal(again.decode(made.encode(images)), made.decode(made.encode(images)))
    with pytest.raises(
        UserError, match="number of heads of width 32 is not known: give --num_heads"
    ):
        import_model("alitok", str(tmp_path / "AliTok.safetensors"))
    module = import_model("alitok", str(tmp_path / "last.pth"), options=ImportOptions(num_heads=2))
    assert isinstance(module, AliTok) and module.stage == "bidirectional"


def test_sizes_that_do_not_fit_are_refused() -> None:
    state = to_official(make("causal"))
    with pytest.raises(UserError, match="have 20 tokens for 4 x 4 patches; AliTok has 21"):
        from_official({**state, "latent_tokens": state["latent_tokens"][1:]}, (4, 2))
    with pytest.raises(ValueError, match="patch_size 5 does not divide image_size 16"):
        AliTok(ClusteringVQ(24, 5), 16, 5)
    with pytest.raises(ValueError, match="stage is 'decoder'"):
        AliTok(ClusteringVQ(24, 5), 16, 4, stage="decoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffer is 0"):
        AliTok(ClusteringVQ(24, 5), 16, 4, ENCODER, DECODER, "bidirectional", buffer=0)
    with pytest.raises(ValueError, match="needs \\[B, 3"):
        make("causal").encode(torch.zeros(1, 3, 8, 8))

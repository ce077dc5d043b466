"""Semanticist's tokenizer by its spec's invariants: causal slots, nested dropout, the diffusion decoder, sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.importing import import_model
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.networks.vision import VisionFeatures
from tessellar.processes.diffusion import linear_process
from tessellar.protocol.configured import LossOnly
from tessellar.protocol.layout import Continuous, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae.official import to_official as vae_to_official
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.semanticist import (
    Semanticist,
    SlotDecoding,
    SlotTraining,
    semanticist_l,
    semanticist_xl,
)
from tessellar.tokenizers.semanticist.official import from_official, to_official
from tessellar.tokenizers.semanticist.official_vae import load_vae
from tessellar.tokenizers.semanticist.tokenizer import process_of, standardised
from tessellar.tokenizers.titok import ViTSize

N, C = 6, 4
ENCODER, DECODER = ViTSize(24, 2, 3), ViTSize(32, 3, 4)


def make(shaken: bool = True, **options: Any) -> Semanticist:
    """Pixels are drawn; shaken, so that what starts at zero shows."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"decoding": SlotDecoding(steps=3, guidance=1.0)}
    made = Semanticist(16, 4, N, C, None, 4, ENCODER, DECODER, **(arguments | options))
    if shaken:
        shake(made)
    return made.eval()


def shake(module: nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def counted(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def test_a_slot_sees_the_image_and_the_slots_before_it() -> None:
    made = make()
    slots = made.encode(images())
    assert made.layout == sequence_layout(N, Continuous(C), min_prefix=1)
    made.encoder.slots[:, 3] = torch.randn(24, generator=torch.Generator().manual_seed(9))
    changed = made.encode(images())
    torch.testing.assert_close(changed[:, :3], slots[:, :3], atol=1e-6, rtol=0)
    assert all(not torch.allclose(changed[:, k], slots[:, k], atol=1e-3) for k in range(3, N))


@torch.no_grad()
def test_the_encoder_reads_images_from_zero_to_one() -> None:
    made = make()
    seen: list[Tensor] = []
    made.encoder.patch_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made.encode(images())
    torch.testing.assert_close(seen[0], (images() + 1) / 2)


@torch.no_grad()
def test_the_first_slots_are_those_of_an_encoder_with_fewer() -> None:
    made = make()
    slots = made.encode(images())
    for count in (1, 4, N):
        torch.testing.assert_close(made.encode(images(), count), slots[:, :count])
    with pytest.raises(ValueError, match=r"length is 7; it must be in \[1, 6\]"):
        made.encode(images(), 7)


@torch.no_grad()
def test_slots_are_standardised_without_an_epsilon() -> None:
    slots = make().encode(images())
    torch.testing.assert_close(slots.mean(-1), torch.zeros(2, N), atol=1e-6, rtol=0)
    torch.testing.assert_close(slots.std(-1), torch.ones(2, N))
    # Exactly so, however small they are.
    tiny = 1e-12 * torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(standardised(tiny), torch.tensor([[-1.0, 0, 1]]).double())


@torch.no_grad()
def test_kept_slots_stay_and_the_others_are_the_null_of_their_place() -> None:
    decoder = make().decoder
    slots = torch.randn(2, N, C)
    kept = torch.tensor([N, 2])
    filled = decoder.fill(slots, kept)
    assert torch.equal(filled[0], slots[0])
    assert torch.equal(filled[1, :2], slots[1, :2])
    assert torch.equal(filled[1, 2:], decoder.null[0, 2:])
    assert torch.equal(decoder.fill(slots[:, :3], torch.tensor([3, 0]))[0, 3:], decoder.null[0, 3:])
    assert torch.equal(decoder.fill(slots, torch.zeros(2))[0], decoder.null[0])


@torch.no_grad()
def test_slots_have_no_position_in_the_decoder() -> None:
    decoder = make().decoder
    maps = images()
    t = torch.tensor([3, 900])
    slots = torch.randn(2, N, C)
    found = decoder(maps, t, slots)
    permuted = decoder(maps, t, slots[:, torch.tensor([4, 0, 5, 2, 1, 3])])
    torch.testing.assert_close(permuted.eps, found.eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted.share, found.share, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(decoder(maps, t, 2 * slots).eps, found.eps, atol=1e-3)
    # The time is that of each image.
    alone = decoder(maps[1:], t[1:], slots[1:])
    torch.testing.assert_close(alone.eps, found.eps[1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_new_decoder_predicts_nothing() -> None:
    made = make(shaken=False)
    found = made.decoder(images(), torch.tensor([1, 2]), torch.randn(2, N, C))
    assert not bool(found.eps.any()) and not bool(found.share.any())
    # The first half of the channels is of the column, the second of the row: sines, then cosines.
    table = made.decoder.positions[0].view(4, 4, 32)
    assert torch.equal(table[0, :, :16], table[3, :, :16])
    assert torch.equal(table[:, 1, 16:], table[:, 2, 16:])
    angle = torch.tensor(3.0) * 10000.0 ** (-1 / 8)
    torch.testing.assert_close(table[0, 3, 1], angle.sin())
    torch.testing.assert_close(table[0, 3, 9], angle.cos())


def test_betas_are_linear_and_respaced_steps_keep_the_survival() -> None:
    process = linear_process()
    assert float(process.betas[0]) == 1e-4 and float(process.betas[-1]) == pytest.approx(0.02)
    torch.testing.assert_close(process.betas.diff(), torch.full((999,), 0.0199 / 999).double())
    short = process_of(250)
    assert (len(short.steps), short.steps[0], short.steps[1], short.steps[-1]) == (250, 0, 4, 999)
    torch.testing.assert_close(short.survival, process.survival[list(short.steps)])


@torch.no_grad()
def test_decoding_what_was_encoded_is_the_reconstruction_and_a_batch_changes_nothing() -> None:
    made = make()
    output = made(images(3))
    tokens = made.encode(images(3))
    assert torch.equal(output.tokens, tokens)
    assert torch.equal(made.decode(tokens), output.reconstruction)
    assert output.reconstruction.shape == (3, 3, 16, 16)
    alone = made.decode(tokens[1:2])
    torch.testing.assert_close(alone, output.reconstruction[1:2], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prefixes_start_from_one_noise_and_lengths_are_of_each_image() -> None:
    made = make()
    tokens = made.encode(images())
    short = made.decode(tokens[:, :2])
    whole = made.decode(tokens)
    mixed = made.decode(tokens, lengths=torch.tensor([2, N]))
    torch.testing.assert_close(mixed[0], short[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], whole[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(short, whole, atol=1e-2)
    with pytest.raises(ValueError, match=r"lengths are \[0, 2\]; give 2 in \[1, 6\]"):
        made.decode(tokens, lengths=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="noise has 1 streams for 2 images"):
        made.decode(tokens, noise=Noise([0]))


@torch.no_grad()
def test_guidance_moves_the_noise_and_leaves_the_variance_conditional() -> None:
    """Two steps by hand: eps of the null slots plus w times the difference, variance of the slots."""
    made = make()
    slots = made.encode(images(1))
    process = process_of(2)
    draws = Noise([7])
    x = draws.normal(16 * 16, 3)
    for step in (1, 0):
        maps = x.view(1, 16, 16, 3).permute(0, 3, 1, 2)
        t = torch.tensor([float(process.steps[step])])
        conditional = made.decoder(maps, t, slots)
        null = made.decoder(maps, t, made.decoder.null)
        eps = null.eps + 3 * (conditional.eps - null.eps)
        eps, share = (m.permute(0, 2, 3, 1).reshape(1, -1, 3) for m in (eps, conditional.share))
        noise = draws.normal(16 * 16, 3) if step else None
        x = process.reverse(x, step, eps, share, noise, 1.0)
    found = made.decode(slots, steps=2, guidance=3.0, noise=Noise([7]))
    expected = x.view(1, 16, 16, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_a_prefix_is_kept_from_the_nested_phase_on() -> None:
    made = make(training_settings=SlotTraining(nested_after=2, null=0.25)).train()
    torch.manual_seed(0)
    before = made.draw_kept(4000)
    assert before.unique().tolist() == [0, N]
    assert float((before == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    for _ in range(2):
        made(images())
    assert int(made.passes) == 2 and int(made.state_dict()["passes"]) == 2
    after = made.draw_kept(6000)
    assert after.unique().tolist() == list(range(1, N + 1))
    shares = after.bincount()[1:] / 6000
    torch.testing.assert_close(shares, torch.full((N,), 1 / N), atol=0.03, rtol=0)
    made.eval()(images())
    assert int(made.passes) == 2, "only training passes are counted"


def test_losses_of_a_new_model_are_those_of_predicting_nothing() -> None:
    made = make(shaken=False)
    maps = images()
    noise = torch.randn(2, 3, 16, 16)
    t = torch.tensor([0, 500])
    slots = torch.randn(2, N, C)
    losses = made.losses(maps, maps, slots, torch.tensor([N, 1]), t, noise)
    torch.testing.assert_close(losses["diffusion"], noise.square().mean())
    process = linear_process()
    zero = torch.zeros(2, 3 * 16 * 16)
    bound = process.losses(zero, zero, maps.flatten(1), t, noise.flatten(1))[1]
    torch.testing.assert_close(losses["bound"], bound.mean())
    assert set(losses) == {"diffusion", "bound"}


class Eyes(LossOnly, nn.Module):
    """A vision model of 5 channels on a grid of 8 x 8."""

    dim, grid = 5, (8, 8)

    def forward(self, images: Tensor) -> VisionFeatures:
        pooled = F.adaptive_avg_pool2d(images.sum(1, keepdim=True), 8).flatten(1)
        patches = torch.stack([pooled * k + 1 for k in range(5)], -1)
        return VisionFeatures(patches[:, :0], patches)


def test_repa_compares_the_tapped_patches_and_gradients_reach_everything() -> None:
    made = make(repa_dim=5, teacher=Eyes(), tap=2).train()
    output = made(images(8))
    assert output.reconstruction.shape == (8, 0, 16, 16)
    assert set(output.losses) == {"diffusion", "bound", "repa"}
    assert -1 <= float(output.losses["repa"]) <= 1
    torch.stack(list(output.losses.values())).sum().backward()
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not bool(p.grad.any())] == []
    assert set(dict(made.named_parameters())) - set(trained) == {"decoder.positions"}
    features = made.decoder(images(), torch.tensor([1, 2]), torch.randn(2, N, C)).features
    maps = features.view(2, 4, 4, 5).permute(0, 3, 1, 2)
    own = F.interpolate(maps, (8, 8), mode="bicubic").permute(0, 2, 3, 1).reshape(2, 64, 5)
    expected = -F.cosine_similarity(own, Eyes()(images()).patches, dim=-1).mean()
    torch.testing.assert_close(made.repa(features, images()), expected)
    with pytest.raises(ValueError, match="repa_dim is 4; the teacher's patches have 5 channels"):
        make(repa_dim=4, teacher=Eyes(), tap=2)


def vae() -> KLVAE:
    torch.manual_seed(5)
    return KLVAE(GaussianBottleneck(5, scale=0.2325), 16, 32, (1, 2), 1).eval()


def with_vae() -> Semanticist:
    made = Semanticist(16, 8, N, C, vae(), 2, ENCODER, DECODER, decoding=SlotDecoding(2, 1.0))
    shake(made)
    return made.eval()


@torch.no_grad()
def test_latents_of_a_frozen_vae_are_drawn() -> None:
    made = with_vae()
    made.train()
    assert made.vae is not None and not made.vae.training
    assert all(not p.requires_grad for p in made.vae.parameters())
    latents = made.latents(images())
    tokens = made.vae.encode(images()).view(2, 8, 8, 5)
    torch.testing.assert_close(latents, tokens.permute(0, 3, 1, 2))
    assert not torch.equal(made.latents(images(), sample=True), latents)
    assert made.eval().decode(made.encode(images())).shape == (2, 3, 16, 16)


def test_official_files_hold_an_average_of_what_is_trained(tmp_path: Path) -> None:
    made = with_vae()
    state = to_official(made)
    assert not any(key.startswith(("vae.", "dit.pos_embed")) for key in state)
    file = tmp_path / "semanticist_tok_L.pkl"
    torch.save({f"_orig_mod.{key}": tensor for key, tensor in state.items()}, file)
    with pytest.raises(UserError, match="hold no VAE: put MAR's kl16.ckpt beside .*tok_L.pkl"):
        import_model("semanticist", str(file))
    torch.save({"model": vae_to_official(vae())}, tmp_path / "kl16.ckpt")
    options = ImportOptions(num_heads=3, decoder_heads=4)
    again = import_model("semanticist", str(file), options=options)
    assert isinstance(again, Semanticist)
    ours = made.state_dict()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours[key]), key
    # A preset reads the same file, or an export.
    exported = export_tokenizer(vae(), tmp_path / "export")
    for weights in (tmp_path / "kl16.ckpt", exported):
        assert torch.equal(load_vae(weights, 16).encode(images()), vae().encode(images()))
    with pytest.raises(UserError, match="is a Semanticist; Semanticist's VAE is a KLVAE"):
        load_vae(export_tokenizer(made, tmp_path / "whole"), 16)
    with pytest.raises(UserError, match="not the weights of a Semanticist tokenizer"):
        from_official({}, None)


def test_the_rows_of_a_modulation_change_places() -> None:
    made = make()
    state = to_official(made)
    shift, scale, gate = state["dit.blocks.1.adaLN_modulation.1.bias"].view(6, 32)[3:]
    ours = made.decoder.blocks[1].modulation.linear.bias.view(6, 32)  # type: ignore[union-attr]
    assert torch.equal(ours[1], gate) and torch.equal(ours[3], scale)
    assert torch.equal(ours[5], shift)
    convolution = state["dit.x_embedder.proj.weight"]
    patch = torch.randn(1, 3, 4, 4)
    expected = F.conv2d(patch, convolution, state["dit.x_embedder.proj.bias"])[:, :, 0, 0]
    found = made.decoder.patch_in(made.grid.split(patch))[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "total", "decoder", "frozen", "projector"),
    [
        (semanticist_l, 551_169_680, 464_919_424, 65_536, 7_869_184),
        (semanticist_xl, 768_326_544, 682_076_288, 73_728, 8_131_328),
    ],
)
def test_sizes(preset: Any, total: int, decoder: int, frozen: int, projector: int) -> None:
    with torch.device("meta"):
        made = preset()
    assert made.vae is not None and made.decoder.projector is not None
    assert counted(made) - counted(made.vae) == total
    assert counted(made.encoder) == 86_237_952 and counted(made.to_slot) == 12_304
    assert counted(made.decoder) == decoder
    assert counted(made.decoder.projector) == projector
    assert made.decoder.positions.numel() == frozen
    assert made.training_settings.nested_after == 50 * (1_281_167 // 2048)

"""MingTok: recorded outputs, streaming equals the whole pass, hidden patches, both stages, measured latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.networks.vision import Teacher, teacher
from tessellar.parity.verify import verify
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.tokenizers.mingtok import MingTok, mingtok_512, official
from tessellar.tokenizers.mingtok.tokenizer import PUBLISHED, visible_l1
from tessellar.tokenizers.mingtok.transformers import patchify, unpatchify
from tessellar.tokenizers.quantizers.gaussian import measure_scale
from tessellar.tokenizers.quantizers.latent_norm import LatentNorm
from tessellar.tokenizers.titok import ViTSize

GOLDEN = Path(__file__).parents[1] / "golden" / "mingtok"
SMALL = ViTSize(24, 2, 3)


def model(seed: int = 0, norm: LatentNorm | None = None, **options: Any) -> MingTok:
    torch.manual_seed(seed)
    sizes = {"encoder_size": SMALL, "semantic_size": SMALL, "pixel_size": ViTSize(16, 1, 2)}
    made = MingTok(norm or LatentNorm(6), 16, 4, **{**sizes, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny_teacher(width: int) -> Teacher:
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": width, "depth": 1, "num_heads": 2}
    made = teacher("vit_tiny_patch16_224", None, 16, sizes)
    made.model.filled = True
    return made


@pytest.mark.parametrize("cases", [["tok", "loss", "cached"], ["interp"]])
def test_recorded_outputs_are_reproduced(cases: list[str]) -> None:
    report = verify(GOLDEN, cases)
    assert report.passed, report.as_dict()
    assert {c.case for c in report.comparisons} == set(cases)


@torch.no_grad()
def test_forward_is_decode_of_encode() -> None:
    made = model(norm=LatentNorm(6, 0.3, 1.7)).eval()
    tokens, output = made.encode(images()), made(images())
    assert made.layout == grid_layout(4, 4, Continuous(6), "latents") and tokens.shape == (2, 16, 6)
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=2e-5, rtol=0)
    torch.testing.assert_close(tokens, output.tokens)
    again = made.quantizer.decode(tokens)
    torch.testing.assert_close(again, made.latents(images()))
    torch.testing.assert_close(tokens, (again - 0.3) / 1.7)


@torch.no_grad()
def test_features_one_at_a_time_are_those_of_the_whole_pass() -> None:
    made = model().eval()
    tokens = made.encode(images())
    whole = made.semantics(tokens)
    decoder = made.semantic_decoder
    for sizes in ([1] * 16, [5, 1, 7, 3]):
        cache = decoder.new_cache(2, 16)
        streamed = []
        for part in made.quantizer.decode(tokens).split(sizes, 1):
            streamed.append(decoder(part, cache))
        torch.testing.assert_close(torch.cat(streamed, 1), whole, atol=1e-5, rtol=0)
    changed = tokens.clone()
    changed[:, 9] += 1
    after = made.semantics(changed)
    assert torch.equal(after[:, :9], whole[:, :9])
    assert bool((after[:, 9:] != whole[:, 9:]).any(-1).all())
    # The class token is last, so patches do not see it.
    latents = made.encoder(images())
    with_class = decoder(latents)[:, :-1]
    torch.testing.assert_close(with_class, whole, atol=1e-5, rtol=0)


def test_training_reaches_every_parameter_and_hides_patches() -> None:
    options: dict[str, Any] = {"teacher": tiny_teacher(20), "semantic_dim": 20}
    options |= {"detail_teacher": tiny_teacher(12), "detail_dim": 12, "masked": (0.4, 0.6)}
    made = model(**options).train()
    output = made(images())
    assert set(output.losses) == {"semantic", "detail"} and output.tokens.shape == (2, 16, 6)
    hidden = int((output.tokens == 0).all(-1).sum(1)[0])
    assert 6 <= hidden <= 9
    total = output.reconstruction.square().mean() + torch.stack(list(output.losses.values())).sum()
    total.backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []
    assert made.config["init_args"]["teacher"] is None
    assert int(made.quantizer.passes) == 1
    with pytest.raises(UserError, match="detail_dim is 5; the teacher's patches have 12"):
        model(detail_teacher=tiny_teacher(12), detail_dim=5)


@torch.no_grad()
def test_only_visible_patches_are_encoded_and_hidden_pixels_may_cost_nothing() -> None:
    made = model(masked=(0.5, 0.5), reconstruct_hidden=False).train()
    places = torch.tensor([[0, 5, 6, 15], [1, 2, 3, 8]])
    changed = images()
    changed[0, :, 12:, :4] += 0.5  # patch 12, hidden
    output, after = made.masked_forward(images(), places), made.masked_forward(changed, places)
    torch.testing.assert_close(after.tokens, output.tokens)
    assert torch.equal(output.reconstruction[0, :, 12:, :4], images()[0, :, 12:, :4])
    assert not torch.isclose(output.reconstruction[0, :, :4, :4], images()[0, :, :4, :4]).any()
    hidden = torch.ones(2, 16).scatter(1, places, 0.0)
    expected = visible_l1(output.reconstruction, images(), 2, hidden) * 4 / 16
    torch.testing.assert_close((output.reconstruction - images()).abs().mean(), expected)
    patches = patchify(images(), 2)
    assert torch.equal(unpatchify(patches, 2), images())
    assert torch.equal(patches[0, 1].unflatten(0, (2, 2, 3))[0, 1], images()[0, :, 0, 3])


def test_latents_are_measured_while_training_and_on_data() -> None:
    norm = LatentNorm(3).train()
    draw = torch.Generator().manual_seed(0)
    latents = 5 * torch.randn(8, 40, 3, generator=draw) + 2
    for part in latents.split(2):
        norm(part)
    tokens = norm.encode(latents)
    assert abs(float(tokens.mean())) < 0.02 and abs(float(tokens.std()) - 1) < 0.02
    center = norm.center.clone()
    norm(torch.full((1, 2, 3), float("nan")))
    assert torch.equal(norm.center, center)
    fixed = LatentNorm(3, *PUBLISHED).train()
    fixed(latents)
    assert float(fixed.center) == pytest.approx(PUBLISHED[0])
    made = model().eval()
    measure_scale(made, [images()[:1], images()[1:]])
    tokens = made.encode(images()).detach()
    assert abs(float(tokens.mean())) < 1e-4 and float(tokens.std(correction=0)) == pytest.approx(
        1, abs=1e-4
    )
    with pytest.raises(UserError, match="deviation of LatentNorm is 0.0"):
        LatentNorm(3, 0.0, 0.0)


def test_the_pixel_decoder_alone_is_trained_in_its_stage() -> None:
    trained = model(masked=(0.4, 0.6), semantic_dim=5)
    made = model(seed=1, stage="pixels").train()
    made.load_state_dict(made.starting_from(trained.state_dict()))
    center = made.quantizer.center.clone()
    output = made(images())
    assert output.losses == {} and torch.equal(made.quantizer.center, center)
    output.reconstruction.square().mean().backward()
    for name, parameter in made.named_parameters():
        reads = name.startswith("pixel_decoder.")
        assert (parameter.grad is not None) == parameter.requires_grad == reads, name
    torch.testing.assert_close(output.tokens, trained.eval().encode(images()))


@torch.no_grad()
def test_a_config_rebuilds_it_and_positions_follow_the_image_size() -> None:
    made = model().eval()
    again = build(made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.encode(images()), made.encode(images()))
    larger = model(trained_size=16).eval()
    larger.encoder.load_state_dict(made.encoder.state_dict())
    assert torch.equal(larger.encode(images()), made.encode(images()))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="patch_size 4 must be even and divide the image size 18"):
        MingTok(LatentNorm(6), 18, 4)
    with pytest.raises(UserError, match="5 channels do not divide the encoder's width 24"):
        model(norm=LatentNorm(5))
    with pytest.raises(UserError, match=r"masked is \(0.0, 1.0\)"):
        model(masked=(0.0, 1.0))
    with pytest.raises(UserError, match="stage is 'encoder'"):
        model(stage="encoder")


def test_published_sizes() -> None:
    with torch.device("meta"):
        made = mingtok_512()
    parts = (made.encoder, made.semantic_decoder, made.pixel_decoder, made)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    # The pixel decoder here holds the layer from features to finer patches, 4,198,400.
    assert counts == [87_651_104, 302_771_456, 303_098_624 + 4_198_400, 697_719_584]
    assert len(list(made.parameters())) == 738 and made.layout.length == 256


@torch.no_grad()
def test_the_file_of_the_language_model_and_the_config_beside(tmp_path: Path) -> None:
    made = model(norm=LatentNorm(6, 0.5, 2.0), pixel_size=ViTSize(24, 1, 3)).eval()
    state = {f"vision.{name}": t for name, t in official.to_official(made).items()}
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"mean": 0.5, "scaling_factor": 2.0}')
    options = ImportOptions(num_heads=3, decoder_heads=3, file=str(file))
    importer = official.OFFICIAL[1]
    assert importer.holds(state) and not official.OFFICIAL[0].holds(state)
    again = importer.build({**state, "linear_proj.0.weight": torch.zeros(2, 2)}, options)
    tokens = made.encode(images())
    torch.testing.assert_close(again.encode(images()), tokens)
    torch.testing.assert_close(again.decode(tokens), made.decode(tokens))
    assert importer.to_official(again).keys() == state.keys()
    assert official.norm_beside(None) == PUBLISHED
    (tmp_path / "config.json").write_text('{"mean": "x"}')
    with pytest.raises(UserError, match="has no numbers `mean` and `scaling_factor`"):
        official.norm_beside(str(file))

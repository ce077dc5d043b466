"""The study of MAR's backbone: its runs, and MAR with one thing changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.studies import backbone, steps
from benchmarks.studies.backbone import (
    KNOWN,
    RUNS,
    masked_loss_at,
    rows_of,
    table,
)
from benchmarks.studies.backbone_parts import CausalMAR, GridMAR, RasterMAR
from tessellar.cli.evaluation_sweep import varied
from tessellar.models.bitdance.head import sincos_table
from tessellar.models.mar import MAR
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import Sampling
from tests.tiny.image_generators import of_classes

LAYOUT = grid_layout(4, 4, Continuous(3))
LABELS = Condition(ids=torch.tensor([0, 2]))
MASKED: dict[str, Any] = {
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "head_width": 16,
    "head_depth": 1,
    "num_classes": 5,
    "buffer": 2,
    "steps": 4,
    "dropout": 0.0,
}
CAUSAL: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "ffn_multiple_of": 8,
    "dropout": 0.0,
}


def causal(rotations: bool) -> CausalMAR:
    torch.manual_seed(0)
    made = CausalMAR(LAYOUT, 16, 16, 1, options=CAUSAL, rotations=rotations).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(seed))


def test_every_run_has_a_name_and_settings_of_its_own() -> None:
    names = [row.name for run in RUNS for row in rows_of(run)]
    assert len(set(names)) == len(names)
    for run in RUNS:
        assert (steps.ROOT / run.training(Path("runs")).config).is_file()
        for row in rows_of(run):
            assert row.run == run.name and varied(Sampling(), row.sampling).guidance.scale == 3.0


def test_a_row_has_losses_where_they_were_asked_for() -> None:
    row: dict[str, Any] = {
        "name": "mar",
        "training": {"samples_seen": 16000},
        "metrics": {"FD(a)": 31.034, "accuracy(a)": 0.752},
        "losses": [float(count) for count in KNOWN],
    }
    lines = table([row, {**row, "name": "mar: 64 sets", "losses": None}]).splitlines()
    assert lines[2] == "| mar | 16,000 | 31.03 | 0.75 | 0.000 | 18.000 | 39.000 | 60.000 |"
    assert lines[3] == "| mar: 64 sets | 16,000 | 31.03 | 0.75 |  |  |  |  |"


def test_losses_of_checkpoints_are_kept_beside_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    steps.write_results("backbone", [{"name": "mar"}], updates=250)
    read = []

    def load(file: str, trust: tuple[str, ...]) -> ImageGenerator:
        read.append((file, trust))
        return of_classes(["a"])

    monkeypatch.setattr(backbone, "load", load)
    monkeypatch.setattr(backbone, "next_losses", lambda *_, **__: [0.5, 0.25])
    words = ["--data", "d", "--extractor", "e", "--checkpoints", "early=runs/mar/last.ckpt"]
    backbone.main(words)
    assert read == [("runs/mar/last.ckpt", ("benchmarks",))]
    assert steps.read_results("backbone") == {
        "updates": 250,
        "checkpoints": {"early": [0.5, 0.25]},
        "rows": [{"name": "mar"}],
    }
    assert capsys.readouterr().out == "early 0.500 0.250\n"


@pytest.mark.parametrize("rotations", [False, True])
@torch.no_grad()
def test_the_causal_one_sees_earlier_tokens_alone_and_is_cached_as_it_is_scored(
    rotations: bool,
) -> None:
    generator = causal(rotations)
    tokens = latents()
    scores = generator.score(tokens, LABELS).hidden
    state = generator.start(LABELS)
    assert scores is not None
    for entity in range(16):
        hidden = generator.predict(state, tokens).hidden
        assert hidden is not None
        torch.testing.assert_close(hidden[:, 0], scores[:, entity], atol=1e-5, rtol=1e-4)
    other = tokens.clone()
    other[:, 9] += 1
    moved = (generator.score(other, LABELS).hidden - scores).abs().amax((0, 2))  # type: ignore[operator]
    assert not moved[:10].any() and bool((moved[10:] > 0).all())


@pytest.mark.parametrize("rotations", [False, True])
def test_the_causal_one_trains_and_samples(rotations: bool) -> None:
    generator = causal(rotations).train()
    loss = generator.loss(latents(), LABELS)["diffusion"]
    loss.backward()
    trained = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    still = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    # Of the embedding, rows of classes that are not there.
    assert still == []
    assert ("z_positions" in trained) is not rotations
    if rotations:
        assert not generator.z_positions.any() and bool(generator.rope_sin[1:].any())
    drawn = Sampling(diffusion=varied(Sampling(), {"diffusion.steps": 3}).diffusion)
    tokens = drawn.tokens(generator.eval(), LABELS, [0, 1])
    LAYOUT.check(tokens)


def test_losses_of_the_causal_one_are_mars_own() -> None:
    """One token's loss is that of MAR's head on the same vector."""
    generator = causal(False)
    tokens = latents()
    t = torch.arange(32) * 31
    noise = torch.randn(32, 3)
    with torch.no_grad():
        losses = generator.token_losses(tokens, LABELS, t, noise)[0]
        z = generator.score(tokens, LABELS).hidden + generator.z_positions  # type: ignore[operator]
        mar = MAR(LAYOUT, **MASKED)
        mar.head = generator.flow_head  # type: ignore[assignment]
        wanted = mar.row_losses(tokens.flatten(0, 1), z.flatten(0, 1), t, noise)
    torch.testing.assert_close(losses.flatten(), wanted)


def test_tables_of_positions_start_at_the_grid() -> None:
    made = GridMAR(LAYOUT, MASKED)
    place = torch.arange(16)
    wanted = sincos_table(place // 4, place % 4, 16)
    backbone = made.backbone
    for name in ("encoder_positions", "decoder_positions", "z_positions"):
        tensor = getattr(backbone, name)
        assert tensor.requires_grad and torch.equal(tensor[0, -16:], wanted)
    assert float(backbone.encoder_positions.detach()[0, :2].abs().max()) < 0.2  # the buffer's stay
    plain = MAR(LAYOUT, **MASKED)
    assert made.state_dict().keys() == plain.state_dict().keys()


def test_raster_masks_hide_what_is_behind() -> None:
    generator = RasterMAR(LAYOUT, **MASKED, least_masked=0.0)
    for _ in range(5):
        masked = generator.draw_mask(3)
        assert masked.shape == (3, 16) and bool((masked.int().diff(dim=1) >= 0).all())
    assert generator.plan(Noise([0, 1]), 16).order.tolist() == list(range(16))


@torch.no_grad()
def test_the_loss_of_the_next_token_reads_what_is_before_it_alone() -> None:
    torch.manual_seed(0)
    generator = MAR(LAYOUT, **MASKED).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = latents()
    known = (torch.arange(16) < 6).expand(2, 16)
    # As many draws as the study has: one after the other, of all places.
    t = torch.randint(1000, (16 * 2 * 16,))
    noise = torch.randn(16 * 2 * 16, 3)
    first = masked_loss_at(generator, tokens, known, LABELS, t, noise)
    behind = tokens.clone()
    behind[:, 7:] += 1
    assert masked_loss_at(generator, behind, known, LABELS, t, noise) == first
    before = tokens.clone()
    before[:, 5] += 1
    assert masked_loss_at(generator, before, known, LABELS, t, noise) != first

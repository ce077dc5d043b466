"""AliTok's generator: rotations by segment, the class's zero row, published sizes. (The rest: test_protocol.py.)"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tessellar
from tessellar.cli import train
from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache
from tessellar.models.alitok import AliTokAR, alitok_b, alitok_l, alitok_xl
from tessellar.models.alitok.official import from_official, to_official
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, Continuous, Layout, Segment, grid_layout
from tessellar.tokenizers.alitok import AliTok

CONFIGS = Path(__file__).parents[2] / "configs" / "fashion_mnist"
KIND = Categorical(11)
LAYOUT = Layout((Segment((3,), KIND, "prefix"), Segment((2, 2), KIND, "patches")))
LABELS = Condition(ids=torch.tensor([0, 3]))


def make(**options: Any) -> AliTokAR:
    torch.manual_seed(0)
    return AliTokAR(LAYOUT, 32, 2, 4, 5, dropout=0.0, ffn_multiple_of=8, **options)


def test_prefix_turns_by_place_and_patches_by_row_and_column() -> None:
    made = make()
    angles = torch.atan2(made.rope_sin[1:], made.rope_cos[1:])
    # heads of 8 channels: 4 pairs of a sequence, 2 and 2 of a grid; first frequency 1
    assert angles[:3, 0].tolist() == pytest.approx([0.0, 1.0, 2.0])
    turned = angles[3:, (0, 2)]
    expected = torch.tensor([[3.0, 3.0], [3.0, 4.0], [4.0, 3.0], [4.0, 4.0]])
    wrapped = torch.remainder(expected + torch.pi, 2 * torch.pi) - torch.pi
    torch.testing.assert_close(turned, wrapped)
    norms = made.rope_cos.square() + made.rope_sin.square()
    assert not norms[0].any()
    torch.testing.assert_close(norms[1:], torch.ones(7, 4))


@torch.no_grad()
def test_the_class_is_attended_with_a_score_of_zero() -> None:
    """Its keys are zero in every layer, so every query's score of it is; its values are not."""
    made = make().eval()
    state = made.start(LABELS)
    made.predict(state, torch.randint(11, (2, 7)), count=3)
    assert isinstance(state.cache, KVCache)
    keys, values = state.cache.data[:, 0], state.cache.data[:, 1]
    assert not keys[..., 0, :].any()
    assert bool(keys[..., 1:3, :].any(-1).all())
    assert bool(values[..., :3, :].any(-1).all())


def test_the_first_loss_is_that_of_guessing() -> None:
    tokens = torch.randint(11, (2, 7))
    loss = make().loss(tokens, LABELS)["cross_entropy"]
    assert float(loss.detach()) == pytest.approx(torch.tensor(11.0).log().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("preset", "count"),
    [(alitok_b, 177_048_064), (alitok_l, 317_851_648), (alitok_xl, 662_141_696)],
)
def test_published_sizes(preset: Any, count: int) -> None:
    kind = Categorical(4096)
    layout = Layout((Segment((17,), kind, "prefix"), Segment((16, 16), kind, "patches")))
    with torch.device("meta"):
        generator = preset(layout)
    assert sum(p.numel() for p in generator.parameters()) == count


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    state = to_official(make())
    with pytest.raises(UserError, match="predicts 11 codes, but the tokenizer gives"):
        from_official(state, grid_layout(2, 3, Categorical(12)))
    for lost in ("embeddings.weight", "blocks.1.attn.k_norm.weight"):
        with pytest.raises(UserError) as error:
            from_official({key: t for key, t in state.items() if key != lost}, LAYOUT)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="AliTok's generator predicts categorical tokens"):
        AliTokAR(grid_layout(2, 2, Continuous(4)), 32, 1, 4)
    with pytest.raises(UserError, match="heads of 6 channels cannot turn by row and column"):
        AliTokAR(LAYOUT, 24, 1, 4)


def short_run(config: str, name: str, folder: Path, *options: str) -> None:
    """Two updates of a config of Fashion-MNIST, on drawn shapes in its place."""
    described = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    described["data"] = {
        "class_path": "tessellar.data.ShapesData",
        "init_args": {"size": 32, "length": 8, "val_length": 4, "batch_size": 4},
    }
    described["trainer"] |= {"max_steps": 2, "check_val_every_n_epoch": None}
    described["trainer"] |= {"val_check_interval": 2, "limit_val_batches": 1}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(described))
    train.main(["--config", str(folder / f"{name}.yaml"), "--name", name, *options])


def test_a_tokenizer_and_a_generator_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short_run("alitok", "alitok", tmp_path)
    short_run("alitok_ar", "alitok_ar", tmp_path)
    model = tessellar.load("runs/alitok_ar/export")
    assert isinstance(model, ImageGenerator) and isinstance(model.tokenizer, AliTok)
    assert model.tokenizer.stage == "causal"
    assert model.generator.layout == model.tokenizer.layout

"""Options of a recording's config that only training reads are those of the generator that is built of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessellar.models.har import parity as har
from tessellar.models.llamagen.official import from_config
from tessellar.models.lpd import parity as lpd
from tessellar.models.mar import parity as mar
from tessellar.models.tokenbridge import parity as tokenbridge
from tessellar.models.var import parity as var
from tessellar.parity.recording import Recording, read_recording
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.tokenizers.hita import parity as hita
from tessellar.tokenizers.var.parity import recorded_vqvae

GOLDEN = Path(__file__).parents[1] / "golden"
MASKED = {"label_drop_prob": 0.3, "proj_dropout": 0.2, "attn_dropout": 0.4, "mask_ratio_min": 0.5}
OURS_MASKED = {"condition_dropout": 0.3, "dropout": 0.2, "attention_dropout": 0.4}
OURS_MASKED |= {"least_masked": 0.5}


def _var(recording: Recording) -> Generator:
    return var.recorded_generator(recording, recorded_vqvae(recording))


def _llamagen(recording: Recording) -> Generator:
    config = recording.config["c2i"]
    layout = grid_layout(4, 4, Categorical(config["vocab_size"]))
    return from_config(recording.weights["c2i"], config, layout)


@pytest.mark.parametrize(
    ("system", "part", "options", "build", "ours"),
    [
        ("mar", "mar", MASKED, mar.recorded_generator, OURS_MASKED),
        ("tokenbridge", "model", MASKED, tokenbridge.recorded_generator, OURS_MASKED),
        (
            "restok",
            "generator",
            {"class_dropout_prob": 0.3, "all_dropouts": 0.2},
            har.recorded_generator,
            {"condition_dropout": 0.3, "dropout": 0.2},
        ),
        (
            "var",
            "var",
            {"cond_drop_rate": 0.3, "drop_path_rate": 0.2},
            _var,
            {"condition_dropout": 0.3, "drop_path": 0.2},
        ),
        ("lpd", "", {"label_drop_prob": 0.3}, lpd.recorded_generator, {"condition_dropout": 0.3}),
        (
            "llamagen",
            "c2i",
            {"class_dropout_prob": 0.3, "dropouts": 0.2, "drop_path_rate": 0.15},
            _llamagen,
            {"condition_dropout": 0.3, "dropout": 0.2, "drop_path": 0.15},
        ),
    ],
)
def test_training_options_are_kept(
    system: str,
    part: str,
    options: dict[str, Any],
    build: Callable[[Recording], Generator],
    ours: dict[str, float],
) -> None:
    recording = read_recording(GOLDEN / system)
    config = recording.config[part] if part else recording.config
    config.update(options)
    built = build(recording).config["init_args"]
    assert {name: built[name] for name in ours} == ours


def test_dropout_of_hitas_tokenizer_is_kept() -> None:
    recording = read_recording(GOLDEN / "hita")
    recording.config["tokenizer"]["encoder_decoder_transformers"]["dropout"] = 0.3
    assert hita.recorded_tokenizer(recording).config["init_args"]["dropout"] == 0.3

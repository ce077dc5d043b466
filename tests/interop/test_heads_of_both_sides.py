"""Heads are not among an official file's shapes: a decoder may have another number of them than its encoder."""

from pathlib import Path

import pytest
import torch

import tessellar
from tessellar.cli.convert import main
from tessellar.errors import UserError
from tessellar.interop.importer import ImportOptions
from tessellar.models.mar import official as mar
from tessellar.parity.recording import read_recording
from tessellar.tokenizers.hita import official as hita
from tests.tiny import other_generators as tiny

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_file_with_two_numbers_of_heads_is_imported_by_name(tmp_path: Path) -> None:
    recording = read_recording(GOLDEN / "one_d_piece")
    file = str(GOLDEN / "one_d_piece" / recording.weights.files["model"])
    words = ["import", "one_d_piece", file, "--num-heads", "4", "--decoder-heads", "2"]
    main([*words, "--out", str(tmp_path / "ours")])
    tokenizer = tessellar.load_tokenizer(tmp_path / "ours")
    tokens = tokenizer.encode(2 * recording.inputs["images"] - 1)
    assert torch.equal(tokens[:, None], recording.tensors["tokens"])
    images = (tokenizer.decode(tokens[:, :5]) + 1) / 2
    torch.testing.assert_close(images, recording.tensors["image_len5"], atol=1e-3, rtol=1e-3)


def test_heads_of_a_generator_of_two_shapes() -> None:
    made, again = tiny.mar_of_two_shapes()
    state = mar.to_official(made)  # type: ignore[arg-type]
    options = ImportOptions(num_heads=4, decoder_heads=3)
    built = mar.OFFICIAL.build(state, tiny.LATENTS, options)
    assert built.config == again.config


def test_the_heads_of_hitas_tokenizer() -> None:
    state = read_recording(GOLDEN / "hita").weights["tokenizer"]
    made = hita.OFFICIAL.build(state, ImportOptions(image_size=32, num_heads=2))
    assert made.config["init_args"]["num_heads"] == 2


def test_heads_of_a_decoder_alone_are_refused() -> None:
    with pytest.raises(UserError, match="give --num-heads as well"):
        ImportOptions(decoder_heads=2)

"""`evaluate.py tokens` and `probe`, and the features of tokenizers by name."""

import json
from pathlib import Path

import pytest
import torch

from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.evaluate import main
from tessellar.errors import UserError
from tessellar.evaluation.token_metrics import prefix_lengths
from tessellar.evaluation.token_views import view
from tessellar.protocol.layout import Categorical, Layout, Segment, sequence_layout
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.one_d_piece import OneDPiece
from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok import ViTSize
from tessellar.tokenizers.vit_vq import ViTVQ

SHAPES = ["--data", "tessellar.data.ShapesData", "--data.length", "60", "--data.val_length", "40"]
SIZE = ViTSize(16, 1, 2)


def one_d_piece() -> OneDPiece:
    torch.manual_seed(0)
    return OneDPiece(VectorQuantizer(16, 4), 32, 8, 8, SIZE, SIZE).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(export_tokenizer(one_d_piece(), tmp_path_factory.mktemp("one_d_piece") / "export"))


@pytest.fixture
def net(tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--extractor", str(tiny_file)]


def record(*argv: str) -> dict:
    main([*argv, "--out", "record.json"])
    return json.loads(Path("record.json").read_text())


def test_tokens_of_a_tokenizer_by_position_prefix_and_swap(exported: str, net: list[str]) -> None:
    swaps = ["--alpha", "0", "1", "--delta", "1", "16", "--count", "12"]
    found = record("tokens", exported, *SHAPES, *net, *swaps)
    metrics = found["metrics"]
    tokens = found["tokens"]
    assert 0 < metrics["usage"] <= 1 and 0 <= metrics["evenness"] <= 1
    assert len(tokens["usage by position"]) == len(tokens["bits by position"]) == 8
    curve = tokens["prefixes"]
    assert [point["tokens"] for point in curve] == [1, 2, 4, 8]
    assert curve[-1]["PSNR"] == metrics["PSNR"] and curve[-1]["rFD(tiny)"] == metrics["rFD(tiny)"]
    assert curve[0]["PSNR"] != curve[1]["PSNR"] != curve[2]["PSNR"]
    steps = [curve[i]["PSNR"] - curve[i - 1]["PSNR"] for i in range(1, 4)]
    assert [point["PSNR step"] for point in curve[1:]] == pytest.approx(steps)
    # No share, or only the nearest code, changes nothing, to the last bit.
    cells = {(cell["alpha"], cell["delta"]): cell["rFD(tiny)"] for cell in tokens["swaps"]}
    assert cells[0, 1] == cells[0, 16] == cells[1, 1] == metrics["rFD(tiny)"]
    assert cells[1, 16] != metrics["rFD(tiny)"]
    assert metrics["pFD(tiny)"] == pytest.approx(sum(cells.values()) / 4)


def test_chosen_prefixes_without_a_network(exported: str, net: list[str]) -> None:
    few = ["--count", "20", "--prefix_count", "10", "--lengths", "3"]
    found = record("tokens", exported, *SHAPES, "--extractor", "none", *few)
    assert [point["tokens"] for point in found["tokens"]["prefixes"]] == [3, 8]
    assert (
        found["samples"]["images"] == 20 and found["tokens"]["images of prefixes and swaps"] == 10
    )
    assert not any("FD" in name for name in found["metrics"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "9"], "a prefix of 9 tokens was asked for.*decodes from 1 to 8"),
        (["--alpha", "0.5"], "needs both --alpha"),
        (["--alpha", "2", "--delta", "3"], "--alpha is 2.0; it is a share"),
        (["--alpha", "1", "--delta", "17"], r"--delta is 17; it must be in \[1, 16\]"),
    ],
)
def test_mistakes_are_told_before_any_image(
    exported: str, net: list[str], words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(["tokens", exported, *SHAPES, "--extractor", "none", *words])


@pytest.mark.parametrize("quantizer", [FSQ((3, 3)), IBQ(9, 2)], ids=["fsq", "ibq"])
def test_swaps_of_codes_that_are_told_near_from_far(
    quantizer: Quantizer, tmp_path: Path, net: list[str]
) -> None:
    """IBQ's token has the largest product, not the smallest distance."""
    torch.manual_seed(0)
    tokenizer = ViTVQ(quantizer, 32, 8, 16, 1, 1, 2)
    path = str(export_tokenizer(tokenizer, tmp_path / "export"))
    swaps = ["--alpha", "1", "--delta", "1", "9", "--count", "12"]
    found = record("tokens", path, *SHAPES, *net, *swaps)
    cells = {cell["delta"]: cell["rFD(tiny)"] for cell in found["tokens"]["swaps"]}
    assert cells[1] == found["metrics"]["rFD(tiny)"] != cells[9]


def test_swaps_need_one_codebook(tmp_path: Path, net: list[str]) -> None:
    binary = ViTVQ(LFQ(4), 32, 8, 16, 1, 1, 2)
    path = str(export_tokenizer(binary, tmp_path / "lfq"))
    with pytest.raises(UserError, match="one codebook that can be told near from far.*by LFQ"):
        main(["tokens", path, *SHAPES, "--extractor", "none", "--alpha", "1", "--delta", "2"])


def test_prefixes_of_segments_are_whole_ones() -> None:
    kind = Categorical(4)
    scales = Layout((Segment((1,), kind, "scale1"), Segment((2, 2), kind, "scale2")), min_prefix=1)
    assert prefix_lengths(scales) == [1, 5]
    assert prefix_lengths(sequence_layout(12, kind, min_prefix=4)) == [4, 8, 12]
    assert prefix_lengths(sequence_layout(12, kind)) == [12]


def test_features_by_name() -> None:
    tokenizer = one_d_piece()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    tokens = tokenizer.encode(images)
    with torch.no_grad():
        assert torch.equal(view(tokenizer, "latents")(images), tokenizer.latents(images))
        assert torch.equal(
            view(tokenizer, "tokens")(images), tokenizer.quantizer.decode(tokens).float()
        )
        codes = view(tokenizer, "codes")(images)
        assert codes.shape == (3, 1, 16) and torch.allclose(codes.sum(-1), torch.ones(3, 1))
        hidden = view(tokenizer, "encoder.norm_out")(images)
        assert torch.allclose(hidden, tokenizer.encoder.hidden((images + 1) / 2))
        assert view(tokenizer, "pixels")(images).shape == (3, 1, 3 * 32 * 32)
    assert "encode" not in vars(tokenizer.quantizer) and "decode" not in vars(tokenizer.quantizer)
    with pytest.raises(UserError, match="'latent' is no feature of OneDPiece.*latents"):
        view(tokenizer, "latent")
    with pytest.raises(UserError, match="OneDPiece has no semantic decoder"):
        view(tokenizer, "semantics")(images)


def test_continuous_tokens_are_vectors_and_have_no_codes() -> None:
    tokenizer = ViTVQ(GaussianBottleneck(4), 32, 8, 16, 1, 1, 2).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(view(tokenizer, "tokens")(images), tokenizer.encode(images))
    with pytest.raises(UserError, match="continuous tokens have no `codes`"):
        view(tokenizer, "codes")


def test_probes_of_named_features_and_of_codes(exported: str, net: list[str]) -> None:
    asked = ["--features", "latents", "codes", "encoder.norm_out", "--protocol.epochs", "1"]
    probes = ["--probes", "linear", "softmax", "attentive", "knn", "purity"]
    words = [*SHAPES, *asked, *probes, "--protocol.repeats", "2"]
    found = record("probe", exported, *words)
    metrics = found["metrics"]
    for name in ("linear", "softmax", "attentive", "knn"):
        for feature in ("latents", "codes", "encoder.norm_out"):
            assert 0 <= metrics[f"{name}({feature})"] <= 1
    assert "softmax(latents) std" in metrics and "linear(latents) std" not in metrics
    assert 0 <= metrics["information, shuffled"] <= 1 and 0 < metrics["purity"] <= 1
    assert found["samples"]["training images"] == 60 and found["samples"]["images"] == 40
    assert found["comparable"]["protocol"]["repeats"] == 2
    assert record("probe", exported, *words)["metrics"] == metrics  # all chance has a seed


def test_what_a_data_set_has_decides_the_probes(exported: str, net: list[str]) -> None:
    found = record("probe", exported, *SHAPES, "--features", "tokens", "tokens:3", "tokens:8")
    metrics = found["metrics"]
    assert {"linear(tokens)", "knn(tokens)", "purity", "information by position"} <= set(metrics)
    assert metrics["knn(tokens:8)"] == metrics["knn(tokens)"] != metrics["knn(tokens:3)"]
    with pytest.raises(UserError, match="tokens:9: tokens has 8 positions"):
        main(["probe", exported, *SHAPES, "--features", "tokens:9", "--train_count", "20"])
    with pytest.raises(UserError, match=r"are \(24, 24\), the tokenizer reads \(32, 32\)"):
        main(["probe", exported, *SHAPES, "--data.size", "24"])
    with pytest.raises(UserError, match="protocol.neighbours"):
        main(["probe", exported, *SHAPES, "--protocol.neighbours", "0"])

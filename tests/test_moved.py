"""What moved: classes, arguments and tensors of older files; fingerprints that moves and new defaults leave alone."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from tessellar.callbacks.ema import EMA
from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.fingerprint import model_fingerprint
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.checkpoints.weights import current_names, first_names
from tessellar.data.token_cache.cached_tokens import CachedTokens
from tessellar.errors import UserError
from tessellar.protocol import moved
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Categorical, Segment
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

VIT, VQ = "tessellar.tokenizers.vit_vq.ViTVQ", "tessellar.tokenizers.quantizers.vq.VectorQuantizer"
OLD = Path(__file__).parent / "data_of_versions" / "v0.1"


def vit() -> ViTVQ:
    torch.manual_seed(0)
    return ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2)


def rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the class, two arguments and two names of tensors had been others once."""
    monkeypatch.setitem(moved.MOVED, "tessellar.tokenizers.once.Once", VIT)
    monkeypatch.setitem(moved.ARGUMENTS, VIT, {"dim": "width", "verbose": None})
    monkeypatch.setitem(moved.ARGUMENTS, VQ, {"codes": "vocab_size"})
    monkeypatch.setitem(moved.TENSORS, VIT, {"embed": "patch_in"})
    monkeypatch.setitem(moved.TENSORS, VQ, {"book": "codebook"})


def as_before(config: dict) -> dict:
    """The config of `vit()` as the older version would have written it."""
    arguments = dict(config["init_args"])
    quantizer = dict(arguments["quantizer"]["init_args"])
    quantizer["codes"] = quantizer.pop("vocab_size")
    arguments["quantizer"] = {"class_path": VQ, "init_args": quantizer}
    arguments["dim"], arguments["verbose"] = arguments.pop("width"), True
    return {"class_path": "tessellar.tokenizers.once.Once", "init_args": arguments}


def test_former_names_of_arguments_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = vit().config
    rename(monkeypatch)
    assert build(as_before(config)).config == config
    both = as_before(config)
    both["init_args"]["width"] = 16
    with pytest.raises(UserError, match="width is given twice"):
        build(both)


def test_an_export_with_former_names_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = vit()
    config, tensors = made.config, made.state_dict()
    rename(monkeypatch)
    former = as_before(config)

    class Before(ViTVQ):
        """Writes what the older version wrote."""

        config = former  # type: ignore[assignment]

        def state_dict(self, *args, **kwargs):  # noqa: ANN002, ANN003
            names = dict(zip(tensors, first_names(made, list(tensors)), strict=True))
            return {names[name]: tensor for name, tensor in tensors.items()}

    export_tokenizer(Before(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2), tmp_path / "old")
    written = (tmp_path / "old/config.yaml").read_text()
    assert "once.Once" in written and "codes: 16" in written
    loaded = load_tokenizer(tmp_path / "old")
    assert loaded.config == config
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())


def test_names_of_tensors_go_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    made = nn.ModuleDict({"tokenizer": vit()})
    names = list(made.state_dict())
    rename(monkeypatch)
    former = first_names(made, names)
    assert "tokenizer.embed.weight" in former and "tokenizer.quantizer.book.weight" in former
    assert current_names(made, former) == names


def test_averages_of_former_names_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = vit()
    rename(monkeypatch)
    names = first_names(target, list(target.state_dict()))
    ema = EMA()
    ema.load_state_dict(
        {"updates": 1, "average": dict(zip(names, target.state_dict().values(), strict=True))}
    )
    module = nn.Module()
    module.ema_target = target
    with ema.swapped(module):  # type: ignore[arg-type]
        assert ema.average.keys() == target.state_dict().keys()


def test_a_move_leaves_the_fingerprint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before, elsewhere = model_fingerprint(vit()), "tessellar.tokenizers.elsewhere"
    module = ModuleType(elsewhere)
    module.ViTVQ = ViTVQ  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, elsewhere, module)
    monkeypatch.setattr(ViTVQ, "__module__", elsewhere)
    monkeypatch.setitem(moved.MOVED, VIT, f"{elsewhere}.ViTVQ")
    assert vit().config["class_path"] == f"{elsewhere}.ViTVQ"
    assert model_fingerprint(vit()) == before


def test_a_new_argument_with_a_default_leaves_the_fingerprint_alone() -> None:
    """Also where it is nested; one that is not at its default counts, as do weights."""
    before, more = model_fingerprint(vit()), vit()
    recorded = more.__dict__["_config"]
    recorded["attention"] = "auto"
    assert model_fingerprint(more) == before
    del recorded["attention"]  # as if the argument had been added since
    assert model_fingerprint(more) == before
    recorded["attention"] = "sdpa"
    assert model_fingerprint(more) != before
    other = vit()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert model_fingerprint(other) != before


def test_a_version_raised_by_hand_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tokenizer, and of what it is made of."""
    before = model_fingerprint(vit())
    for raised in (ViTVQ, VectorQuantizer):
        with monkeypatch.context() as patch:
            patch.setattr(raised, "encoding_version", 2)
            assert model_fingerprint(vit()) != before


def test_a_layout_counts() -> None:
    made, other = vit(), vit()
    segment = Segment((16,), Categorical(16))
    object.__setattr__(other.layout, "segments", (segment,))
    assert model_fingerprint(made) != model_fingerprint(other)


def test_a_cache_of_an_older_version_is_taken_and_only_by_its_tokenizer(tmp_path: Path) -> None:
    header = json.loads((OLD / "cache/train/header.json").read_text())
    tokenizer = load_tokenizer(OLD / "exports/vit_vq")
    assert header["tokenizer"] != model_fingerprint(tokenizer)  # it covered the whole config
    CachedTokens(OLD / "cache/train").require(tokenizer)
    with torch.no_grad():
        next(tokenizer.parameters()).add_(1)
    with pytest.raises(UserError, match="another tokenizer"):
        CachedTokens(OLD / "cache/train").require(tokenizer)
    shutil.copytree(OLD / "cache/train", tmp_path / "train")
    header["tokenizer_config"]["init_args"]["quantizer"]["init_args"]["l2_normalize"] = False
    (tmp_path / "train/header.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="another tokenizer"):
        CachedTokens(tmp_path / "train").require(load_tokenizer(OLD / "exports/vit_vq"))

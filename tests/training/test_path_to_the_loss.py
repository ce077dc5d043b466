"""How far a reader walks: files whose lines run from the start of a `training_step` to the loss.

The demo's generator on tokens of its tokenizer: a batch is conditioned, embedded, attended and scored.
Fewer files are easier to read in order; a new one has to be worth the jump. Of images, the frozen
tokenizer comes first, a part of its own.
"""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.train import parse

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (ROOT / "tessellar", ROOT / "models", ROOT / "tokenizers")
MOST = 12
MOST_OF_A_TOKENIZER = 6


class LossReached(Exception):
    """The step stands before its first gradient."""


def config(name: str, *options: str) -> Any:
    """The module that a YAML of the demo builds."""
    arguments = ["--config", str(ROOT / f"configs/demo/{name}.yaml"), "--name", "x", *options]
    return parse(arguments).model


def files_until_the_loss(module: Any, batch: dict[str, torch.Tensor]) -> set[str]:
    """Files of the project with a line that runs in `training_step` before `backward_and_step`."""
    seen: set[str] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename).resolve()
        if not any(path.is_relative_to(room) for room in ROOMS):
            return None  # lines of torch and of the standard library are not counted
        if event == "line":
            seen.add(str(path.relative_to(ROOT)))
        return trace

    def stop(*_: Any) -> None:
        raise LossReached

    module.backward_and_step = stop
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(LossReached):
            module.training_step(batch, 0)
    finally:
        sys.settrace(before)
    return seen


def test_the_loss_of_the_demos_generator_is_read_in_a_dozen_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_tokenizer(config("tokenizer").tokenizer, tmp_path / "tokenizer")
    module = config("generator", f"--model.init_args.tokenizer={tmp_path / 'tokenizer'}")
    module.train()
    module.players = module.make_players()
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    label = torch.tensor([3, 7])
    tokens = module.tokenizer.encode(images)

    files = files_until_the_loss(module, {"tokens": tokens, "label": label})
    assert {"models/llamagen/model.py", "tessellar/layers/attention.py"} <= files
    assert len(files) <= MOST, f"{len(files)} files: {', '.join(sorted(files))}"

    encoding = files_until_the_loss(module, {"image": images, "label": label}) - files
    assert "tokenizers/vit_vq/tokenizer.py" in encoding
    assert len(encoding) <= MOST_OF_A_TOKENIZER, sorted(encoding)

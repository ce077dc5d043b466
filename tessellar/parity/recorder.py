"""Making a recording: the folder that `convert.py verify` reads (`meta.json`, `io.safetensors`,
weights).

    def record(recorder: Recorder) -> None:  # of official code, or of anything that gives tensors
        recorder.weights("model", model.state_dict())
        images = recorder.input("images", torch.rand(2, 3, 16, 16), case="encode", meaning="images in [0, 1]")
        recorder.output("tokens", model.encode(images), case="encode")

Whatever is random in an output is an input, or greedy decoding is used: a recording is compared on
other machines.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.checkpoints.staging import staged_folder
from tessellar.errors import UserError
from tessellar.parity.recording import dtype_name
from tessellar.tensor_files import write_safetensors

META = "meta.json"
IO = "io.safetensors"
TOLERANCE = 1e-4  # of floating outputs, absolute and relative, where none is given


class Recorder:
    """Collects the weights, inputs and outputs of one system, then writes them.

    `config` are the options that a replay builds its module from; `source` says whose code gave the
    outputs.
    """

    def __init__(
        self, system: str, config: Mapping[str, Any] | None = None, source: str = ""
    ) -> None:
        self.system = system
        self.config: dict[str, Any] = dict(config or {})
        self.source = source
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._cases: dict[str, dict[str, Any]] = {}

    def weights(self, part: str, state: Mapping[str, Tensor]) -> None:
        """The state dict of a part, under the names that an importer reads."""
        self._parts[part] = {name: _kept(tensor) for name, tensor in state.items()}

    def settings(self, case: str, **settings: Any) -> None:
        """What the replay of a case needs beyond `config` (plain data)."""
        self._cases.setdefault(case, {}).update(settings)

    def input(self, name: str, tensor: Tensor, case: str = "main", meaning: str = "") -> Tensor:
        """Record what a replay is given; returns it."""
        self._add(name, tensor, {"role": "input", "case": case, "meaning": meaning})
        return tensor

    def output(
        self,
        name: str,
        tensor: Tensor,
        case: str = "main",
        meaning: str = "",
        atol: float | None = None,
        rtol: float | None = None,
    ) -> None:
        """Record what a replay has to give: within atol + rtol |recorded|, integers exactly."""
        default = TOLERANCE if tensor.is_floating_point() else 0.0
        tolerances = {
            "atol": default if atol is None else atol,
            "rtol": default if rtol is None else rtol,
        }
        self._add(name, tensor, {"role": "output", "case": case, "meaning": meaning, **tolerances})

    def write(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the folder, complete or not at all; raises UserError where it exists or nothing was
        recorded.
        """
        if not any(entry["role"] == "output" for entry in self._entries.values()):
            raise UserError("nothing was recorded: no output")
        files = {part: f"weights_{part}.safetensors" for part in self._parts}
        if "model" in files:
            files["model"] = "weights.safetensors"
        meta = {
            "system": self.system,
            "source": self.source,
            "config": self.config,
            "files": files,
            "cases": {case: {"settings": settings} for case, settings in self._cases.items()},
            "tensors": self._entries,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        with staged_folder(Path(folder), META, overwrite) as stage:
            for part, state in self._parts.items():
                write_safetensors(state, stage / files[part])
            write_safetensors(self._tensors, stage / IO)
            (stage / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    def _add(self, name: str, tensor: Tensor, facts: dict[str, Any]) -> None:
        if name in self._entries:
            raise UserError(f"{name!r} is recorded twice; names of tensors are unique")
        self._tensors[name] = _kept(tensor)
        self._cases.setdefault(facts["case"], {})
        self._entries[name] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor), **facts}


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU, with memory of its own."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

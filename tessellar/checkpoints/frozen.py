"""Frozen parts of a run's checkpoints: one file a run beside them, its fingerprint in each.

A frozen tokenizer may be half of a checkpoint, and a run keeps three of them (`last`, `previous`,
`best`). So its tensors are left out, and `checkpoint["frozen"]` names the fingerprint of what lies
in `tokenizer_<fingerprint>.safetensors` in the same folder. Tensors that change after all get
another fingerprint, and so another file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tessellar.checkpoints.weights import digest_of
from tessellar.errors import UserError
from tessellar.tensor_files import read_safetensors, write_safetensors

FROZEN_KEY = "frozen"
FINGERPRINT = "fingerprint"
#: Files that checkpoints share; no results of a run by themselves.
FILE = re.compile(r"tokenizer_[0-9a-f]{16}\.safetensors")


def file_of(part: str, fingerprint: str) -> str:
    """Name of the file that holds a frozen part."""
    return f"{part}_{fingerprint}.safetensors"


class FrozenParts:
    """Leaves frozen parts out of checkpoints in `folder`, and sees to it that they lie beside them.

    A fingerprint is computed again only where something has written to a tensor since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[list[tuple[int, int]], str]] = {}

    def place(self, parts: Mapping[str, nn.Module]) -> None:
        """Write the files of `parts`, given by their prefixes in the state dict (such as
        `model.tokenizer.`), where they are not there; raises UserError where that cannot be done.
        """
        for prefix, module in parts.items():
            fingerprint = self._fingerprint(prefix, module)
            path = self.folder / file_of(prefix.rstrip(".").rpartition(".")[2], fingerprint)
            if not path.exists():
                alone = {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}
                self.folder.mkdir(parents=True, exist_ok=True)
                write_safetensors(alone, path, {FINGERPRINT: fingerprint})

    def leave_out(self, checkpoint: dict[str, Any], parts: Mapping[str, nn.Module]) -> None:
        """Take the tensors of `parts` out of a checkpoint, and name their fingerprints there."""
        for prefix, module in parts.items():
            kept = {}
            for name, tensor in checkpoint["state_dict"].items():
                if not name.startswith(prefix):
                    kept[name] = tensor
            checkpoint["state_dict"] = kept
            checkpoint.setdefault(FROZEN_KEY, {})[prefix] = self._fingerprint(prefix, module)

    def _fingerprint(self, prefix: str, module: nn.Module) -> str:
        state = module.state_dict()
        versions = [(tensor.data_ptr(), tensor._version) for tensor in state.values()]
        known = self._known.get(prefix)
        if known is None or known[0] != versions:
            self._known[prefix] = known = (versions, digest_of(state))
        return known[1]


def put_back(
    checkpoint: dict[str, Any],
    where: str | Path,
    folder: Path | None,
    parts: Mapping[str, nn.Module] | None = None,
) -> None:
    """Complete the state dict of a checkpoint `where` that leaves frozen parts out: with the tensors
    of `parts` (by prefix) where these are the same, else with the files in `folder`.

    Raises UserError that says what is needed where neither has them.
    """
    entries = checkpoint.get(FROZEN_KEY, {})
    if not isinstance(entries, Mapping):
        raise UserError(f"{where}: what it says of frozen parts is a {type(entries).__name__}")
    for prefix, fingerprint in entries.items():
        part = str(prefix).rstrip(".").rpartition(".")[2]
        if not FILE.fullmatch(file_of(part, str(fingerprint))):
            raise UserError(f"{where}: {str(prefix)!r:.40} is no frozen part of a checkpoint")
        own = {} if parts is None or prefix not in parts else parts[prefix].state_dict()
        if not own or digest_of(own) != fingerprint:
            own = _read(file_of(part, fingerprint), fingerprint, part, where, folder)
        state = dict(checkpoint["state_dict"])
        state.update({prefix + name: tensor for name, tensor in own.items()})
        checkpoint["state_dict"] = state


def _read(
    name: str, fingerprint: str, part: str, where: str | Path, folder: Path | None
) -> dict[str, Tensor]:
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        raise UserError(
            f"{where} was taken out of its run and needs the frozen {part} of it: put {name} from the run's "
            "folder checkpoints beside it (or take the run's export, which holds all)"
        )
    tensors, metadata = read_safetensors(path)
    if metadata.get(FINGERPRINT) != fingerprint:
        raise UserError(f"{path} is not the {part} that its name says: take the run's own file")
    return tensors

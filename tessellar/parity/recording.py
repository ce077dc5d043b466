"""A folder of recorded official outputs: config, weights, inputs and what was measured, all access
tracked.

`meta.json` says what every tensor of `io.safetensors` is (role, case, tolerance, meaning) and which
weight file holds which part. What a replay never reads, and what nothing compares, is known
afterwards.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.checkpoints.weights import part_of
from tessellar.errors import UserError, check_is_file
from tessellar.interop.options import check_options, check_sizes
from tessellar.plain_data import parse_json
from tessellar.protocol.condition import Condition
from tessellar.tensor_files import read_safetensors

Outputs = dict[str, Tensor]
"""What a replay computes, by the names of the recorded outputs."""


@dataclass(frozen=True)
class Entry:
    """One recorded tensor as `meta.json` describes it."""

    role: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str
    atol: float
    rtol: float
    settings: Mapping[str, Any] = field(default_factory=dict)


class TrackedTensors(Mapping[str, Tensor]):
    """Tensors by name that remember which of them were read."""

    def __init__(self, tensors: Mapping[str, Tensor], what: str) -> None:
        self._tensors = dict(tensors)
        self._what = what
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"{self._what} {name!r} is not in the recording")
        self.used.add(name)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class WeightFiles(Mapping[str, dict[str, Tensor]]):
    """State dicts by part (`vq`, `c2i`, ...), read at first use; files that `storage` names are
    cast to float32.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], storage: Mapping[str, str]) -> None:
        self.folder = folder
        self.files = dict(files)
        self.storage = storage
        self._read: dict[str, dict[str, Tensor]] = {}

    @property
    def used(self) -> set[str]:
        return set(self._read)

    def __getitem__(self, part: str) -> dict[str, Tensor]:
        if part not in self.files:
            raise UserError(
                f"{self.folder} records no weights of part {part!r}; it has {', '.join(self.files)}"
            )
        if part not in self._read:
            state, _ = read_safetensors(self.folder / self.files[part])
            if self.files[part] in self.storage:
                state = {k: t.float() if t.is_floating_point() else t for k, t in state.items()}
            self._read[part] = state
        return self._read[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class Settings(dict[str, Any]):
    """Settings of the tensor `name`; one that is asked for and not recorded is a mistake of the
    recording.
    """

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise UserError(f"meta.json: neither {self.name!r} nor its case has the setting {key!r}")


@dataclass
class Recording:
    """One folder. `cases` are those to replay; `inputs` and `weights` are tracked.

    `reach` says how far roundings go in outputs that make them larger (`grown`).
    """

    folder: Path
    system: str
    config: dict[str, Any]
    entries: dict[str, Entry]
    tensors: dict[str, Tensor]
    weights: WeightFiles
    cases: set[str] = field(default_factory=set)
    case_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    reach: dict[str, float] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> TrackedTensors:
        given = {name: self.tensors[name] for name in self.names("input") if name in self.tensors}
        return TrackedTensors(given, "input")

    def grown(self, name: str, value: Tensor, *others: Tensor) -> Tensor:
        """`value` of an output that is no more exact than it is near `others`: the same computation,
        rounded in other places or begun a unit in the last place beside. A recording made on
        another processor lies as far from ours.
        """
        self.reach[name] = max(float((other - value).abs().max()) for other in others)
        return value

    def names(self, role: str, cases: set[str] | None = None) -> list[str]:
        """Names of a role's tensors, of all cases or of some."""
        names = []
        for name, entry in self.entries.items():
            if entry.role == role and (cases is None or entry.case in cases):
                names.append(name)
        return names

    @property
    def output_cases(self) -> set[str]:
        """The selected cases that have outputs; others only hold inputs that several cases share."""
        return {self.entries[name].case for name in self.names("output", self.cases)}

    def outputs(self, pattern: str) -> list[str]:
        """Names of the selected cases' outputs that match a pattern, such as `c2i/greedy_*/tokens`."""
        return [name for name in self.names("output", self.cases) if fnmatchcase(name, pattern)]

    def each(self, pattern: str) -> Iterator[tuple[str, Settings]]:
        """Names of the selected cases' outputs that match a pattern, with their settings."""
        for name in self.outputs(pattern):
            yield name, self.settings(name)

    def options(
        self,
        part: str = "",
        read: Collection[str] = (),
        supported: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The official config, or a part of it (`tokenizer.cnn`: a part of a part).

        Raises UserError for an option that is neither `read` nor has the one value that is
        supported.
        """
        config, where = self._config(part)
        check_options(config, where, read, supported)
        return config

    def check_sizes(self, found: Mapping[str, Any], part: str = "") -> None:
        """Raises UserError where the config, or a part of it, says something else than was `found`
        in the weights.
        """
        config, where = self._config(part)
        check_sizes(config, where, found)

    def _config(self, part: str) -> tuple[dict[str, Any], str]:
        """A part of the config, and what it is called in messages."""
        config = self.config
        for name in filter(None, part.split(".")):
            config = config[name]
        return config, f"the config's {part}" if part else "the config"

    def state(self, prefix: str, file: str = "model") -> dict[str, Tensor]:
        """The tensors of a weight file whose names begin with `prefix`, without it."""
        return part_of(self.weights[file], prefix)

    def classes(self, name: str) -> Condition:
        """The condition of recorded class ids."""
        return Condition(ids=self.inputs[name])

    def settings(self, name: str) -> Settings:
        """What the replay of a tensor needs beyond `config`: its case's settings, overridden by its
        own.
        """
        if name not in self.entries:
            raise UserError(f"meta.json describes no tensor {name!r}")
        entry = self.entries[name]
        return Settings(name, {**self.case_settings.get(entry.case, {}), **entry.settings})


def read_recording(folder: str | Path) -> Recording:
    """The recording in `folder`, all cases selected; raises UserError where the folder is not one."""
    folder = Path(folder)
    meta = read_meta(folder / "meta.json")
    tensors, _ = read_safetensors(folder / "io.safetensors")
    entries = {name: _entry(name, facts) for name, facts in meta["tensors"].items()}
    try:
        cases = meta.get("cases", {})
        settings = {case: dict(facts.get("settings", {})) for case, facts in cases.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"meta.json: `cases` is not a table of settings by case ({error})"
        ) from error
    return Recording(
        folder=folder,
        system=meta["system"],
        config=meta["config"],
        entries=entries,
        tensors=tensors,
        weights=WeightFiles(folder, meta.get("files", {}), meta.get("storage", {})),
        cases={entry.case for entry in entries.values()},
        case_settings=settings,
    )


def read_meta(path: Path) -> dict[str, Any]:
    try:
        check_is_file(path)
        meta = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(
            f"{path.parent} is not a folder of recorded outputs: it has no readable meta.json"
        ) from error
    keys = ["system", "config", "tensors"]
    missing = [key for key in keys if key not in meta] if isinstance(meta, dict) else keys
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return meta


def _entry(name: str, facts: Mapping[str, Any]) -> Entry:
    try:
        return Entry(
            role=facts["role"],
            case=facts["case"],
            shape=tuple(facts["shape"]),
            dtype=facts["dtype"],
            meaning=facts.get("meaning", ""),
            atol=float(facts.get("atol", 0.0)),
            rtol=float(facts.get("rtol", 0.0)),
            settings=dict(facts.get("settings", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"meta.json: tensor {name!r} is not described as it should be ({error!r})"
        ) from error


def dtype_name(tensor: Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix(f"{torch.__name__}.")

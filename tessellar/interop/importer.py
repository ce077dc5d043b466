"""Shared machinery of importers: a table of key patterns theirs <-> ours, read in both directions.

A pattern is a key with placeholders: `{i}` (one letter) stands for a number, a longer name such as `{tensor}` for one
path component. A rule may carry a pair of inverse tensor functions. Nothing is guessed: a key without a rule is fatal
and listed, and so is (by `load_strict`) a key of ours that no rule filled.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.weights import Weights, listing, read_pickle, read_safetensors

WRAPPERS = ("model", "module", "state_dict", "ema")
"""Entries of official training checkpoints that may hold the weights, in order of preference."""


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Rule:
    """Pattern of their key, pattern of ours with the same placeholders, and the tensor functions between them."""

    theirs: str
    ours: str
    to_ours: Callable[[Tensor], Tensor] = same
    to_theirs: Callable[[Tensor], Tensor] = same


@dataclass(frozen=True)
class KeyTable:
    """Rules (the first that matches counts) and patterns of their keys that carry nothing of the model's."""

    rules: tuple[Rule, ...]
    drop: tuple[str, ...] = field(default=())

    def from_official(self, state: Mapping[str, Tensor], where: str = "the checkpoint") -> dict[str, Tensor]:
        """Our state dict from theirs; raises UserError that lists keys without a rule."""
        kept = {key: t for key, t in state.items() if all(_match(p, key) is None for p in self.drop)}
        return Weights(self._translate(kept, where, lambda rule: (rule.theirs, rule.ours, rule.to_ours)), where)

    def to_official(self, state: Mapping[str, Tensor], where: str = "the model") -> dict[str, Tensor]:
        """Their state dict from ours (without the dropped keys); the inverse of `from_official`."""
        return self._translate(state, where, lambda rule: (rule.ours, rule.theirs, rule.to_theirs))

    def _translate(
        self, state: Mapping[str, Tensor], where: str, direction: Callable[[Rule], Any]
    ) -> dict[str, Tensor]:
        result, unknown = {}, []
        for key, tensor in state.items():
            for source, target, function in map(direction, self.rules):
                if (values := _match(source, key)) is not None:
                    result[target.format(**values)] = function(tensor)
                    break
            else:
                unknown.append(key)
        if unknown:
            raise UserError(f"{where} has keys that this importer does not know; {listing('unknown', unknown)}")
        return result


def table(pairs: Mapping[str, str], *rules: Rule, drop: Iterable[str] = ()) -> KeyTable:
    """A table from `{theirs: ours}`, then rules with tensor functions."""
    return KeyTable((*(Rule(theirs, ours) for theirs, ours in pairs.items()), *rules), tuple(drop))


def _match(pattern: str, key: str) -> dict[str, str] | None:
    """Placeholder values where `key` matches the pattern; `*` matches anything."""
    parts = re.split(r"(\{\w+\}|\*)", pattern)
    found = re.fullmatch("".join(map(_regex, parts)), key)
    return found.groupdict() if found else None


def _regex(part: str) -> str:
    if part == "*":
        return ".*"
    if not part.startswith("{"):
        return re.escape(part)
    name = part[1:-1]
    return f"(?P<{name}>{r'[0-9]+' if len(name) == 1 else r'[^.]+'})"


def read_official(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Weights of an official file (safetensors or torch pickle), unwrapped and without DDP or compile prefixes.

    `key` names the entry to take (`ema`, for example); by default the first of WRAPPERS that is there.
    """
    path = Path(path)
    content = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    return Weights(unwrap(content, str(path), key), str(path))


def unwrap(content: Any, where: str, key: str | None = None) -> dict[str, Tensor]:
    """The state dict inside a checkpoint's content; raises UserError where there is none."""
    if key is not None and (not isinstance(content, Mapping) or key not in content):
        there = sorted(map(str, content)) if isinstance(content, Mapping) else []
        raise UserError(f"{where} has no entry {key!r}; {listing('there', there)}")
    if key is not None:
        return unwrap(content[key], f"{where}[{key}]")
    while isinstance(content, Mapping) and not _is_state_dict(content):
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not _is_state_dict(content):
        raise UserError(f"{where} holds no weights: neither a state dict nor one under {', '.join(WRAPPERS)}")
    return _without_prefix(dict(content))


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            return _without_prefix({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state

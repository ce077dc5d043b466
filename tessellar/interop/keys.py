"""Tables of keys theirs <-> ours, read in both directions.

A pattern is a key with placeholders: `{i}` (one letter) stands for a number, a longer name such as
`{tensor}` for one path component. A rule may carry a pair of inverse tensor functions. Nothing is
guessed: a key without a rule is fatal and listed, and so is (by `load_strict`) a key of ours that
no rule filled.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.tensor_files import Weights, listing


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Rule:
    """Pattern of their key, pattern of ours with the same placeholders, and the tensor functions
    between them.
    """

    theirs: str
    ours: str
    to_ours: Callable[[Tensor], Tensor] = same
    to_theirs: Callable[[Tensor], Tensor] = same


@dataclass(frozen=True)
class KeyTable:
    """Rules (the first that matches counts) and patterns of their keys that carry nothing of the
    model's.
    """

    rules: tuple[Rule, ...]
    drop: tuple[str, ...] = field(default=())

    def from_official(
        self, state: Mapping[str, Tensor], where: str = "the checkpoint"
    ) -> dict[str, Tensor]:
        """Our state dict from theirs; raises UserError that lists keys without a rule."""
        kept = {}
        for key, tensor in state.items():
            if not matches(key, self.drop):
                kept[key] = tensor
        return Weights(
            self._translate(kept, where, lambda rule: (rule.theirs, rule.ours, rule.to_ours)), where
        )

    def to_official(
        self, state: Mapping[str, Tensor], where: str = "the model"
    ) -> dict[str, Tensor]:
        """Their state dict from ours (without the dropped keys); the inverse of `from_official`."""
        return self._translate(state, where, lambda rule: (rule.ours, rule.theirs, rule.to_theirs))

    def _translate(
        self, state: Mapping[str, Tensor], where: str, direction: Callable[[Rule], Any]
    ) -> dict[str, Tensor]:
        result = {}
        unknown = []
        for key, tensor in state.items():
            for source, target, function in map(direction, self.rules):
                if (values := match_key(source, key)) is not None:
                    result[target.format(**values)] = function(tensor)
                    break
            else:
                unknown.append(key)
        if unknown:
            raise UserError(
                f"{where} has keys that this importer does not know; {listing('unknown', unknown)}"
            )
        return result


def table(pairs: Mapping[str, str], *rules: Rule, drop: Iterable[str] = ()) -> KeyTable:
    """A table from `{theirs: ours}`, then rules with tensor functions."""
    return KeyTable((*(Rule(theirs, ours) for theirs, ours in pairs.items()), *rules), tuple(drop))


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key matches one of several patterns."""
    return any(match_key(pattern, key) is not None for pattern in patterns)


def match_key(pattern: str, key: str) -> dict[str, str] | None:
    """Placeholder values where `key` matches the pattern; `*` matches anything."""
    # re.split keeps what a group matches: literal parts and placeholders alternate.
    expression = ""
    for part in re.split(r"(\{\w+\}|\*)", pattern):
        name = part[1:-1]
        if part == "*":
            expression += ".*"
        elif not part.startswith("{"):
            expression += re.escape(part)
        elif len(name) == 1:  # {i}: a number
            expression += f"(?P<{name}>[0-9]+)"
        else:  # {tensor}: one component of the path
            expression += f"(?P<{name}>[^.]+)"
    found = re.fullmatch(expression, key)
    return found.groupdict() if found else None

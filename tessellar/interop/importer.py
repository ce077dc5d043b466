"""Shared machinery of importers: a table of key patterns theirs <-> ours, read in both directions.

A pattern is a key with placeholders: `{i}` (one letter) stands for a number, a longer name such as `{tensor}` for one
path component. A rule may carry a pair of inverse tensor functions. Nothing is guessed: a key without a rule is fatal
and listed, and so is (by `load_strict`) a key of ours that no rule filled.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tessellar.errors import UserError
from tessellar.tensor_files import Weights, listing, read_pickle, read_safetensors, say_unchecked

log = logging.getLogger(__name__)


DEEPEST = 3  # levels at which sets of weights are looked for


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


def read_official(path: str | Path, key: str | None = None, order: Sequence[str] = ()) -> dict[str, Tensor]:
    """Weights of an official file (safetensors or torch pickle), unwrapped and without DDP or compile prefixes.

    `key` names the entry to take (`ema`, for example); else `order` decides, as in `unwrap`.
    """
    return Weights(unwrap(read_content(path), str(path), key, order), str(path))


def read_content(path: str | Path) -> Any:
    """What an official file holds, as it is."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_pickle(path)
    state, metadata = read_safetensors(path)
    say_unchecked(path, metadata)
    return state


def unwrap(
    content: Any, where: str, key: str | None = None, order: Sequence[str] = (), evaluated: bool = True
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint's content: itself, its entry `key`, or its first entry in `order`.

    The first name in `order` is what the paper evaluates (unless `evaluated` is false: then it is a preference), the
    others are what else may be taken. Of a file with one entry that is taken, whatever its name. Says in one line which
    entry was taken where there are several, or where the evaluated one is missing. Raises UserError where there is no
    state dict, no entry `key`, or several of which `order` names none.
    """
    if key is not None:
        return unwrap(_entry(content, key, where), f"{where}[{key}]")
    if isinstance(content, Mapping) and _is_state_dict(content):
        return without_prefix(dict(content))
    found = state_dicts(content)
    taken = preferred(found, order)
    if not found:
        raise UserError(f"{where} holds no weights: neither a state dict nor one in an entry")
    if taken is None:
        raise UserError(f"{where} holds several sets of weights ({', '.join(found)}); choose one with --key")
    others = [name for name in found if name != taken]
    which = f"{taken!r} is taken" + (f", not {', '.join(others)} (--key takes another)" if others else "")
    if evaluated and order and not _is_under(taken, order[0]):
        log.info("%s has no %r, which the paper evaluates; %s", where, order[0], which)
    elif others:
        log.info("%s: %s", where, which)
    return without_prefix(dict(found[taken]))


def state_dicts(content: Any, depth: int = DEEPEST) -> dict[str, Mapping[str, Tensor]]:
    """All state dicts in a checkpoint's content by the path of their entry, `a.b`; optimizers have none by name."""
    found: dict[str, Mapping[str, Tensor]] = {}
    if not isinstance(content, Mapping) or depth == 0:
        return found
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Mapping):
            continue
        if _is_state_dict(value):
            found[name] = value
        else:
            found |= {f"{name}.{inner}": state for inner, state in state_dicts(value, depth - 1).items()}
    return found


def preferred(found: Mapping[str, Any], order: Sequence[str]) -> str | None:
    """The first of `order` among the entries, or the only entry; None where nothing decides."""
    for wanted in order:
        for name in found:
            if _is_under(name, wanted):
                return name
    return next(iter(found)) if len(found) == 1 else None


def _is_under(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def _entry(content: Any, key: str, where: str) -> Any:
    """The entry `key`, or the one at that path (`a.b`)."""
    inner, rest = content, [key]
    if not isinstance(content, Mapping) or key not in content:
        rest = key.split(".")
    for name in rest:
        if not isinstance(inner, Mapping) or name not in inner:
            there = sorted(map(str, content)) if isinstance(content, Mapping) else []
            raise UserError(f"{where} has no entry {key!r}; {listing('there', there)}")
        inner = inner[name]
    return inner


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of what DDP and compilation wrapped."""
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            return without_prefix({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return state


@dataclass(frozen=True)
class ImportOptions:
    """What the weights do not say: side of the images, attention heads, and the name of a published variant.

    `file` is where the weights were read; a config may lie beside them.
    """

    image_size: int | None = None
    num_heads: int | None = None
    variant: str | None = None
    file: str | None = None

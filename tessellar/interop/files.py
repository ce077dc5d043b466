"""Official files: what they hold, and which of several sets of weights is taken."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tessellar.checkpoints.description import HEADER_KEY
from tessellar.checkpoints.weights import part_of
from tessellar.errors import UserError
from tessellar.tensor_files import (
    Weights,
    listing,
    read_metadata,
    read_pickle,
    read_safetensors,
    say_unchecked,
)

log = logging.getLogger(__name__)

DEEPEST = 3  # levels at which sets of weights are looked for


def read_official(
    path: str | Path, key: str | None = None, order: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Weights of an official file (safetensors or torch pickle), unwrapped and without DDP or
    compile prefixes.

    `key` names the entry to take (`ema`, for example); else `order` decides, as in `unwrap`.
    """
    return Weights(unwrap(read_content(path), str(path), key, order), str(path))


def is_official_file(path: str | Path) -> bool:
    """Whether this is a weight file that none of our commands wrote."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        return HEADER_KEY not in read_metadata(path)
    if path.suffix == ".ckpt" and path.is_file():  # ours, or one as MAR's kl16.ckpt
        return HEADER_KEY not in read_pickle(path)
    return path.suffix in (".pt", ".pth", ".bin", ".pkl")


def read_content(path: str | Path) -> Any:
    """What an official file holds, as it is."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_pickle(path)
    state, metadata = read_safetensors(path)
    say_unchecked(path, metadata)
    return state


def unwrap(
    content: Any,
    where: str,
    key: str | None = None,
    order: Sequence[str] = (),
    evaluated: bool = True,
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint's content: itself, its entry `key`, or its first entry in
    `order`.

    The first name in `order` is what the paper evaluates (unless `evaluated` is false: then it is a
    preference), the others are what else may be taken. Of a file with one entry that is taken,
    whatever its name. Says in one line which entry was taken where there are several, or where the
    evaluated one is missing. Raises UserError where there is no state dict, no entry `key`, or
    several of which `order` names none.
    """
    if key is not None:
        return unwrap(entry_of(content, key, where), f"{where}[{key}]")
    if isinstance(content, Mapping) and _is_state_dict(content):
        return without_prefix(dict(content))
    found = state_dicts(content)
    taken = preferred(found, order)
    if not found:
        raise UserError(f"{where} holds no weights: neither a state dict nor one in an entry")
    if taken is None:
        raise UserError(
            f"{where} holds several sets of weights ({', '.join(found)}); choose one with --key"
        )
    others = [name for name in found if name != taken]
    which = f"{taken!r} is taken" + (
        f", not {', '.join(others)} (--key takes another)" if others else ""
    )
    if evaluated and order and not _is_under(taken, order[0]):
        log.info("%s has no %r, which the paper evaluates; %s", where, order[0], which)
    elif others:
        log.info("%s: %s", where, which)
    return without_prefix(dict(found[taken]))


def sets_of_weights(content: Any) -> list[dict[str, Tensor]]:
    """All state dicts in a checkpoint's content, itself where it is one, without DDP or compile
    prefixes.
    """
    found = list(state_dicts(content).values())
    if isinstance(content, Mapping) and _is_state_dict(content):
        found = [content]
    return [without_prefix(dict(state)) for state in found]


def state_dicts(content: Any, depth: int = DEEPEST) -> dict[str, Mapping[str, Tensor]]:
    """All state dicts in a checkpoint's content by the path of their entry, `a.b`; optimizers have
    none by name.
    """
    found: dict[str, Mapping[str, Tensor]] = {}
    if not isinstance(content, Mapping) or depth == 0:
        return found
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Mapping):
            continue
        if _is_state_dict(value):
            found[name] = value
        else:
            for inner, state in state_dicts(value, depth - 1).items():
                found[f"{name}.{inner}"] = state
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


def entry_of(content: Any, key: str, where: str) -> Any:
    """The entry `key`, or the one at that path (`a.b`)."""
    inner = content
    rest = [key]
    if not isinstance(content, Mapping) or key not in content:
        rest = key.split(".")
    for name in rest:
        if not isinstance(inner, Mapping) or name not in inner:
            there = sorted(map(str, content)) if isinstance(content, Mapping) else []
            raise UserError(f"{where} has no entry {key!r}; {listing('there', there)}")
        inner = inner[name]
    return inner


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of what DDP and compilation wrapped."""
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            return without_prefix(part_of(state, prefix))
    return state

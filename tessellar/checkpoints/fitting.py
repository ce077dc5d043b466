"""Fine-tuning on something else: weights that fit are taken along, rows of classes by their names,
tables of positions resampled; the rest stays as it was made, and is named.

A tensor is taken along as it is where its shape is the same. Tensors whose shape follows from the
data or the size of images are fitted: a table of classes by its rows, a table of positions over its
grid. Any other difference is refused, unless the tensor is named as `fresh`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tessellar.checkpoints.weights import with_current_names
from tessellar.errors import UserError
from tessellar.protocol.layout import Layout
from tessellar.protocol.nearest import nearest
from tessellar.tensor_files import SHOWN, listing

OWN_TABLES = ("conditioning.embedding.weight", "class_embedding.weight", "classes.weight")
SHARED_TABLES = ("embedding.weight", "backbone.embedding.weight")
MOST_BEFORE = 64  # rows of a table of positions before those of the grid: MAR's class buffer


@dataclass(frozen=True)
class ClassTable:
    """Rows of classes in a tensor of the generator: `theirs` [C', ...] of the source, `made`
    [C, ...] as they were before, from row `start` on.
    """

    name: str
    start: int
    theirs: Tensor
    made: Tensor


@dataclass
class Fitted:
    """What was not simply copied: `resampled` and `fresh` tensors by name, and tables of classes."""

    resampled: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    classes: list[ClassTable] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """What shapes follow from: the layout of the tokens, the image's side lengths, the number of
    classes (None: no classes).
    """

    layout: Layout | None = None
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None


def load_fitting(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    *,
    theirs: Sizes,
    ours: Sizes,
    fresh: Sequence[str] = (),
) -> Fitted:
    """Copy what fits of `state` into `module`, whose sizes are `ours`; the source's are `theirs`.

    `fresh` names tensors, or modules, that stay as they were made. Raises UserError, which names
    them and says how to leave them out, for whatever else is missing, unknown or misshapen.
    """
    own = module.state_dict()
    state = with_current_names(module, state)
    _check_fresh(fresh, [*own, *state], where)
    fitted = Fitted(fresh=[name for name in own if _is_among(name, fresh)])
    taken: dict[str, Tensor] = {}
    misshapen: list[str] = []
    for name in own.keys() & state.keys():
        if name in fitted.fresh:
            continue
        if own[name].shape == state[name].shape:
            taken[name] = state[name]
            table = _class_table(name, state[name], own[name], theirs, ours)
            fitted.classes += [] if table is None else [table]
        elif (table := _class_table(name, state[name], own[name], theirs, ours)) is not None:
            taken[name] = _around_classes(state[name], own[name], table)
            fitted.classes.append(table)
        elif (new := resampled(state[name], own[name].shape, theirs, ours)) is not None:
            taken[name] = new
            fitted.resampled.append(name)
        else:
            shapes = f"{tuple(state[name].shape)} for {tuple(own[name].shape)}"
            misshapen.append(f"{name} {shapes}")
    problems = [
        listing("missing", own.keys() - state.keys() - set(fitted.fresh)),
        listing("unknown", [n for n in state.keys() - own.keys() if not _is_among(n, fresh)]),
        listing("of another shape", misshapen),
    ]
    if any(problems):
        odd = [*sorted(own.keys() ^ state.keys()), *(text.split()[0] for text in misshapen)]
        names = ", ".join(sorted({name for name in odd if not _is_among(name, fresh)})[:SHOWN])
        raise UserError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(p for p in problems if p)}. To leave "
            f"tensors as they are made: --model.init_fresh '[{names}]'"
        )
    module.load_state_dict(taken, strict=False)
    fitted.resampled.sort()
    return fitted


def place_classes(
    module: nn.Module,
    tables: Sequence[ClassTable],
    then: Sequence[str],
    now: Sequence[str],
) -> list[str]:
    """Give each class of `now` the row of the class of its name in `then`; others stay as they were
    made. Returns the names that are new.
    """
    new = [name for name in now if name not in then]
    with torch.no_grad():
        for table in tables:
            tensor = module.state_dict()[table.name]  # shares the module's memory
            for label, name in enumerate(now):
                row = table.made[label] if name in new else table.theirs[list(then).index(name)]
                tensor[table.start + label] = row.to(tensor.device, tensor.dtype)
    return new


def _class_table(
    name: str, state: Tensor, own: Tensor, theirs: Sizes, ours: Sizes
) -> ClassTable | None:
    """The rows of classes in a tensor [rows, D]; None where it holds none.

    A table of their own (OWN_TABLES) holds the classes and perhaps one row more, for no class. A
    table that is shared (SHARED_TABLES: RAR, MaskGIT) holds the tokens' codes and a mask before them.
    """
    then = theirs.num_classes
    now = ours.num_classes
    if then is None or now is None or state.ndim != 2 or state.shape[1:] != own.shape[1:]:
        return None
    others = own.shape[0] - now
    if state.shape[0] - then != others:
        return None
    if name.endswith(OWN_TABLES) and others in (0, 1):
        start = 0
    elif name in SHARED_TABLES and others == _vocabulary(ours) + 2:
        start = others - 1
    else:
        return None
    return ClassTable(
        name,
        start,
        theirs=state[start : start + then].clone(),
        made=own[start : start + now].detach().clone(),
    )


def _vocabulary(sizes: Sizes) -> int:
    """Codes of the tokens; 0 where they are no ids."""
    layout = sizes.layout
    return int(layout.vocab().max()) if layout is not None and layout.is_categorical else 0


def _around_classes(state: Tensor, own: Tensor, table: ClassTable) -> Tensor:
    """The rows of the source but those of classes, which are as they were made."""
    behind = state[table.start + len(table.theirs) :]
    return torch.cat([state[: table.start], table.made.to(state), behind]).to(own.dtype)


def resampled(state: Tensor, shape: torch.Size, theirs: Sizes, ours: Sizes) -> Tensor | None:
    """A table of positions of another size, in `shape`; None for a tensor that is none.

    One axis counts places, after at most MOST_BEFORE others (a class token) that are kept; a table
    [1, D, h, w] is resampled over its last two.
    """
    if state.ndim != len(shape):
        return None
    if state.ndim == 4 and state.shape[:2] == shape[:2] and shape[0] == 1:
        return _over_grid(state, (shape[2], shape[3]))
    axes = [axis for axis in range(state.ndim) if state.shape[axis] != shape[axis]]
    if len(axes) != 1:
        return None
    (axis,) = axes
    pieces = _pieces(state.shape[axis], shape[axis], theirs, ours)
    if pieces is None:
        return None
    before, pairs = pieces
    rows = state.movedim(axis, 0)
    parts = [rows[:before]]
    start = before
    for old, new in pairs:
        count = old[0] * old[1]
        flat = rows[start : start + count].flatten(1)
        table = rearrange(flat, "(h w) d -> 1 d h w", h=old[0])
        part = rearrange(_over_grid(table, new), "1 d h w -> (h w) d")
        parts.append(part.reshape(new[0] * new[1], *rows.shape[1:]))
        start += count
    return torch.cat(parts).movedim(0, axis)


Grid = tuple[int, int]


def _pieces(
    then: int, now: int, theirs: Sizes, ours: Sizes
) -> tuple[int, list[tuple[Grid, Grid]]] | None:
    """Rows before the places, and the grids of places then and now, of an axis that had `then`
    entries and has `now`.
    """
    candidates: list[list[tuple[Grid, Grid]]] = []
    if theirs.layout is not None and ours.layout is not None:
        old = [_as_grid(segment.shape) for segment in theirs.layout.segments]
        new = [_as_grid(segment.shape) for segment in ours.layout.segments]
        if len(old) == len(new):
            whole = list(zip(old, new, strict=True))
            candidates += [whole, *([pair] for pair in whole)]
    if theirs.image_size is not None and ours.image_size is not None:
        candidates += _square_grids(then, now, theirs.image_size, ours.image_size)
    for pairs in candidates:
        before = then - sum(h * w for (h, w), _ in pairs)
        same = before == now - sum(h * w for _, (h, w) in pairs)
        if same and 0 <= before <= MOST_BEFORE and any(old != new for old, new in pairs):
            return before, pairs
    return None


def _square_grids(then: int, now: int, old: Grid, new: Grid) -> list[list[tuple[Grid, Grid]]]:
    """Grids of patches whose sides are in the ratio of the images', with a class token or none."""
    found = []
    for before in (0, 1):
        a = isqrt(max(then - before, 0))
        b = isqrt(max(now - before, 0))
        square = a * a == then - before and b * b == now - before
        if square and old[0] == old[1] and new[0] == new[1] and a * new[0] == b * old[0]:
            found.append([((a, a), (b, b))])
    return found


def _as_grid(shape: tuple[int, ...]) -> Grid:
    """A sequence of n places is a grid of n x 1."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def _over_grid(table: Tensor, size: Grid) -> Tensor:
    """[1, D, h, w] resampled to `size`, bicubic over a grid, linear along a sequence."""
    if tuple(table.shape[2:]) == size:
        return table
    mode = "bicubic" if min(*table.shape[2:], *size) > 1 else "bilinear"
    return F.interpolate(table.float(), size=size, mode=mode).to(table.dtype)


def _is_among(name: str, fresh: Sequence[str]) -> bool:
    """Whether a tensor is named, or lies in a module that is."""
    return any(name == one or name.startswith(f"{one}.") for one in fresh)


def _check_fresh(fresh: Sequence[str], names: Sequence[str], where: str) -> None:
    for one in fresh:
        if not any(_is_among(name, [one]) for name in names):
            raise UserError(
                f"init_fresh: neither the model nor {where} has {one!r}{nearest(one, names, listed=0)}"
            )

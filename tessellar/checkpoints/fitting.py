"""Fine-tuning on something else: weights that fit are taken along, rows of classes by their names,
tables of positions resampled; the rest stays as it was made, and is named.

A tensor is taken along as it is where its shape is the same. Tensors whose shape follows from the
data or the size of images are fitted: a table of classes by its rows, a table of positions over its
grid. Any other difference is refused, unless the tensor is named as `fresh`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

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
    """What was not simply copied: `resampled` tensors by name, with their shapes before and after,
    `fresh` ones by name, and tables of classes.
    """

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
    every = {*own, *state}
    left = {name for name in every if _is_among(name, fresh)}
    for one in fresh:
        if not any(_is_among(name, [one]) for name in left):
            hint = nearest(one, [*own, *state], listed=0)
            raise UserError(f"init_fresh: neither the model nor {where} has {one!r}{hint}")
    fitted = Fitted(fresh=[name for name in own if name in left])
    taken: dict[str, Tensor] = {}
    misshapen: dict[str, str] = {}
    for name in (own.keys() & state.keys()) - left:
        there = state[name]
        here = own[name]
        table = _class_table(name, there, here, theirs, ours)
        new = None
        if table is None and here.shape != there.shape:
            new = resampled(there, here.shape, theirs, ours)
        if table is not None:
            fitted.classes.append(table)
        if here.shape == there.shape:
            taken[name] = there
        elif table is not None:
            # The rows of the source but those of classes, which are as they were made.
            behind = there[table.start + len(table.theirs) :]
            rows = torch.cat([there[: table.start], table.made.to(there), behind])
            taken[name] = rows.to(here.dtype)
        elif new is not None:
            taken[name] = new
            shapes = f"{_spelled(there.shape)} to {_spelled(here.shape)}"
            fitted.resampled.append(f"{name} ({shapes})")
        else:
            misshapen[name] = f"{name} {tuple(there.shape)} for {tuple(here.shape)}"
    missing = own.keys() - state.keys() - left
    unknown = state.keys() - own.keys() - left
    problems = [
        listing("missing", missing),
        listing("unknown", unknown),
        listing("of another shape", misshapen.values()),
    ]
    if any(problems):
        names = ", ".join(sorted(missing | unknown | misshapen.keys())[:SHOWN])
        raise UserError(
            f"{where} does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}. To leave "
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
    start = 0
    if name in SHARED_TABLES:
        layout = ours.layout
        if layout is None or not layout.is_categorical or others != layout.vocab().max() + 2:
            return None
        start = others - 1
    elif not name.endswith(OWN_TABLES) or others not in (0, 1):
        return None
    return ClassTable(
        name,
        start,
        theirs=state[start : start + then].clone(),
        made=own[start : start + now].detach().clone(),
    )


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
    candidates: list[tuple[list[Grid], list[Grid]]] = []
    if theirs.layout is not None and ours.layout is not None:
        old = _grids(theirs.layout)
        new = _grids(ours.layout)
        if len(old) == len(new):
            candidates.append((old, new))
            candidates += [([a], [b]) for a, b in zip(old, new, strict=True)]
    of_layouts = list(candidates)
    if theirs.image_size is not None and ours.image_size is not None:
        # Grids of square patches of one size in both images, with a class token or none.
        common = gcd(*theirs.image_size, *ours.image_size)
        for patch in range(1, common + 1):
            if common % patch == 0:
                old_grid = _grid_of(theirs.image_size, patch)
                new_grid = _grid_of(ours.image_size, patch)
                candidates.append(([old_grid], [new_grid]))
    for old, new in candidates:
        before = then - sum(map(prod, old))
        same = before == now - sum(map(prod, new))
        most = MOST_BEFORE if (old, new) in of_layouts else 1
        if same and 0 <= before <= most and old != new:
            return before, list(zip(old, new, strict=True))
    return None


def _grid_of(image_size: tuple[int, int], patch: int) -> Grid:
    """Rows and columns of an image's patches."""
    height, width = image_size
    return height // patch, width // patch


def _grids(layout: Layout) -> list[Grid]:
    """The segments of a layout; a sequence of n places is a grid of n x 1."""
    found = []
    for segment in layout.segments:
        height, width = (*segment.shape, 1)[:2]
        found.append((height, width))
    return found


def _over_grid(table: Tensor, size: Grid) -> Tensor:
    """[1, D, h, w] resampled to `size`, bicubic over a grid, linear along a sequence."""
    if tuple(table.shape[2:]) == size:
        return table
    mode = "bicubic" if min(*table.shape[2:], *size) > 1 else "bilinear"
    return F.interpolate(table.float(), size=size, mode=mode).to(table.dtype)


def _spelled(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))


def _is_among(name: str, fresh: Sequence[str]) -> bool:
    """Whether a tensor is named, or lies in a module that is."""
    return any(name == one or name.startswith(f"{one}.") for one in fresh)

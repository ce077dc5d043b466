"""Rows of a grid as fronts: what algorithms share whose images stand in several rows at once
(`zipar.py`, `parallel_jacobi.py`).

The first token of a row should read the last token of the row above, which is not there yet while
that row is being generated. Its latest token stands in for it, at the place of the missing one;
when the row above is complete, the input is read again with the token itself. Tokens of rows above
that are not there are seen by nobody. So both algorithms are approximate, unless each row waits for
the whole row above.
"""

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.choice import Choice
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import token_order
from tessellar.protocol.generator import Generator
from tessellar.sampling.algorithm import check_in_order


def rows_of(generator: Generator, algorithm: str) -> tuple[int, int]:
    """Rows and columns of the grid; raises UserError unless the generator goes through one grid of
    categorical tokens, row by row.
    """
    check_in_order(generator)
    name = type(generator).__name__
    layout = generator.layout
    if layout.grid is None or not layout.is_categorical:
        raise UserError(
            f"{algorithm} needs categorical tokens of one grid; {name} predicts {layout}"
        )
    entities = generator.entities
    raster = token_order(layout)
    if entities.sizes != raster.sizes or not torch.equal(entities.order, raster.order):
        raise UserError(
            f"{algorithm} needs tokens one by one, row by row; {name} has another order or larger entities"
        )
    return layout.grid


def with_stand_ins(tokens: Tensor, counts: Tensor, ahead: Tensor) -> Tensor:
    """Tokens [B, N] in which the last token of a row is its latest one, where `ahead` [B, R] says
    that the next row begins before this one is complete; `counts` [B, R] tokens of each row are
    known.
    """
    rows = tokens.view(*counts.shape, -1).clone()
    columns = rows.shape[-1]
    latest = (counts - 1).clamp(min=0).to(tokens.device)[..., None]
    stands_in = (ahead & (counts < columns)).to(tokens.device)
    rows[..., -1] = torch.where(stands_in, rows.gather(-1, latest)[..., 0], rows[..., -1])
    return rows.flatten(1)


def laws(distribution: Distribution, choice: Choice, generator: Generator) -> Tensor:
    """Processed probabilities [B, T, V]; raises UserError for another head than independent
    logits.
    """
    if not isinstance(distribution, Logits):
        raise UserError(
            f"decoding in several rows needs a head of independent logits; "
            f"{type(generator).__name__} gives {type(distribution).__name__}"
        )
    return choice.probs(distribution.logits)

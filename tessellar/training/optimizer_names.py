"""States of optimizers, found again by the names of their parameters.

A torch optimizer numbers its states by a parameter's place in its groups, so a parameter that
changes its group would take the moments of another. Checkpoints therefore list names, and the
groups themselves (learning rate, decay, betas) are always those of the run that resumes.
"""

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tessellar import distributed
from tessellar.errors import UserError
from tessellar.layers.tags import tags
from tessellar.tensor_files import listing

log = logging.getLogger(__name__)
OPTIONS = ("peak_lr", "betas", "eps", "weight_decay", "momentum")

FORMERLY_DECAYED: dict[str, dict[str, bool]] = {
    "RAR": {"embedding.weight": True, "last_modulation.linear.weight": True, "start_token": False},
    "MaskGIT": {
        "backbone.embedding.weight": True,
        "backbone.position.weight": True,
        "backbone.token_type.weight": True,
    },
    "HAR": {
        "conditioning.embedding.weight": True,
        "token_embedding.weight": True,
        "special_embedding.weight": True,
    },
    "VAR": {"scale_embedding.weight": True, "layers.*.attention.log_scale": True},
    "MAR": {
        "backbone.class_embedding.weight": False,
        "backbone.null_embedding": False,
        "backbone.*_positions": False,
        "backbone.mask_token": False,
    },
    "ReToKGPT": {"position_embedding": False},
    "PixelDecoder": {"codebook.weight": True},
    "OneDPiece": {"encoder.patch_in.weight": False, "decoder.from_code.weight": False},
    "ResTokEncoder": {"project.weight": True},
    "ResTokDecoder": {"inputs.*.weight": True},
    "ReToK": {"*positions": False, "quantizer.codebook.weight": False},
}
"""Parameters whose group has changed, by class: whether they decayed in checkpoints that list no names."""


def names_by_place(optimizers: Sequence[Optimizer], module: nn.Module) -> list[list[str]]:
    """For each optimizer the names in `module` of its parameters, in the order in which their
    states are numbered.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    orders = []
    for optimizer in optimizers:
        orders.append([names[id(parameter)] for parameter in _parameters(optimizer)])
    return orders


def former_names(optimizers: Sequence[Optimizer], module: nn.Module) -> list[list[str]]:
    """The same of a checkpoint from before names were listed: what decayed came first, each part as
    in the module.
    """
    formerly = formerly_decayed(module)
    orders = []
    for optimizer in optimizers:
        own = set(_parameters(optimizer))
        named = [name for name, parameter in module.named_parameters() if parameter in own]
        orders.append(sorted(named, key=lambda name: not formerly[name]))  # stable
    return orders


def arrange(
    saved: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    optimizers: Sequence[Optimizer],
    module: nn.Module,
) -> list[dict[str, Any]]:
    """The `saved` states of parameters `names` in the order and with the groups of `optimizers`.

    Options that differ are logged, a line each. Raises UserError where the optimizers hold other
    parameters.
    """
    own_names = names_by_place(optimizers, module)
    if not len(saved) == len(names) == len(own_names):
        raise UserError(
            f"the checkpoint has states of {len(saved)} optimizers, this run has {len(own_names)}"
        )
    arranged = []
    for states, there, optimizer, here in zip(saved, names, optimizers, own_names, strict=True):
        check_names(states, there, here)
        # States lie under numbers: name -> number there, then number here -> that state.
        place = dict(zip(there, _numbers(states["param_groups"]), strict=True))
        own = optimizer.state_dict()
        moved = {}
        for number, name in zip(_numbers(own["param_groups"]), here, strict=True):
            if place[name] in states["state"]:
                moved[number] = states["state"][place[name]]
        if distributed.rank() == 0:
            log_changes(
                _options(states["param_groups"], there), _options(own["param_groups"], here)
            )
        arranged.append({**states, "state": moved, "param_groups": own["param_groups"]})
    return arranged


def check_names(states: Mapping[str, Any], there: Sequence[str], here: Sequence[str]) -> None:
    """Raise UserError unless the checkpoint's optimizer has the parameters of this run's."""
    count = len(list(_numbers(states["param_groups"])))
    if len(there) == count and set(there) == set(here):
        return
    if len(there) != count:
        problem = f"{count} of its parameters have states, {len(there)} are expected"
    else:
        missing = listing("missing", set(here) - set(there))
        unknown = listing("unknown", set(there) - set(here))
        problem = "; ".join(filter(None, (missing, unknown)))
    raise UserError(
        f"the checkpoint's optimizer has other parameters than this run's ({problem}): resume with the model and the "
        "optimizer it was saved with, or start anew from its weights (init_from)"
    )


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def _numbers(groups: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    for group in groups:
        yield from group["params"]


def _options(
    groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By parameter: the options of its group that change what an update does."""
    each: list[dict[str, Any]] = []
    for group in groups:
        options = {option: group[option] for option in OPTIONS if option in group}
        if "initial_weight_decay" in group:  # a schedule has changed the value since
            options["weight_decay"] = group["initial_weight_decay"]
        each += [options] * len(group["params"])
    return dict(zip(names, each, strict=True))


def log_changes(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> None:
    changes: dict[str, list[str]] = {}
    for name, options in now.items():
        for option, value in options.items():
            former = before[name].get(option)
            if former is not None and _plain(former) != _plain(value):
                changes.setdefault(
                    f"{option} is now {value}, in the checkpoint {former}", []
                ).append(name)
    for change, names in changes.items():
        log.warning("resumed: %s, for %s", change, listing("parameters", names))


def _plain(value: Any) -> Any:
    """Checkpoints may give a tuple back as a list."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


def formerly_decayed(module: nn.Module) -> dict[str, bool]:
    """Whether each parameter of a module decayed in checkpoints that list no names."""
    former = {}
    for name, parameter in module.named_parameters():
        former[name] = parameter.ndim >= 2 and "no_decay" not in tags(parameter)
    for prefix, part in module.named_modules():
        start = f"{prefix}." if prefix else ""
        for kind in type(part).__mro__:
            for pattern, decayed in FORMERLY_DECAYED.get(kind.__name__, {}).items():
                former |= dict.fromkeys(fnmatch.filter(former, start + pattern), decayed)
    return former

"""Options of official configs: each is read here, or has the one value that is supported, or is
refused by name.
"""

from collections.abc import Collection, Mapping
from typing import Any

from tessellar.errors import UserError


def require(config: Mapping[str, Any], where: str, supported: Mapping[str, Any]) -> None:
    """Raises UserError for an option of the config whose value is not the `supported` one; absent
    ones are fine.
    """
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise UserError(f"{where}: {name} is {config[name]!r}; only {value!r} is supported")


def check_options(
    config: Mapping[str, Any],
    where: str,
    read: Collection[str] = (),
    supported: Mapping[str, Any] | None = None,
) -> None:
    """As `require`, and every option that is neither among those that are `read` nor supported is
    refused as well.
    """
    supported = supported or {}
    require(config, where, supported)
    for name in config:
        if name not in read and name not in supported:
            raise UserError(f"{where}: the official option {name!r} is not known here")


def check_sizes(config: Mapping[str, Any], where: str, found: Mapping[str, Any]) -> None:
    """Raises UserError for an option of the config that is not what was `found` in the weights."""
    for name, value in found.items():
        if config[name] != value:
            raise UserError(f"{where}: {name} is {config[name]!r}; the weights are of {value!r}")

"""What identifies a tokenizer for what is made with it (caches of tokens): all that decides how it
encodes.

That is its tensors, its layout, the arguments that are not at their defaults, and the versions
raised by hand of the classes that it is made of. Names are the first ones that classes and tensors
had. So neither a move nor a new argument with a default changes a fingerprint.
"""

import hashlib
import inspect
import json
from typing import Any

from torch import nn

from tessellar.checkpoints.weights import digest_of, fingerprint, first_names
from tessellar.errors import UserError
from tessellar.protocol.configured import Configured, class_path, describe, resolve
from tessellar.protocol.moved import ARGUMENTS, first_path, renewed

DIGITS = 16


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits, the same wherever the Configured module was loaded from."""
    if not isinstance(model, Configured):
        raise TypeError(f"{type(model).__name__} has no config")
    tensors = model.state_dict()
    named = dict(zip(first_names(model, list(tensors)), tensors.values(), strict=True))
    layout = getattr(model, "layout", None)
    facts = {
        "settings": settings(model.config),
        "layout": None if layout is None else settings(describe(layout)),
        "versions": _versions(model),
        "tensors": digest_of(named),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:DIGITS]


def is_made_by(theirs: str, config: dict[str, Any], model: nn.Module) -> bool:
    """Whether something with fingerprint `theirs`, and with the `config` of its maker, was made by
    this very `model`.

    Up to 0.1 the fingerprint covered the whole config, as it was spelled, and the tensors.
    """
    if theirs == model_fingerprint(model):
        return True
    former = json.dumps([config, fingerprint(model)], sort_keys=True)
    if hashlib.sha256(former.encode()).hexdigest()[:DIGITS] != theirs:
        return False
    assert isinstance(model, Configured)
    return settings(config) == settings(model.config) and not _versions(model)


def settings(config: Any) -> Any:
    """A config by its first names, without arguments that have the default of today."""
    return _without_defaults(renewed(config))


def _without_defaults(config: Any) -> Any:
    if isinstance(config, list):
        return [_without_defaults(item) for item in config]
    if not isinstance(config, dict) or set(config) != {"class_path", "init_args"}:
        return config
    path = config["class_path"]
    given = config["init_args"]
    defaults = defaults_of(path)
    first: dict[str, str] = {}
    for old, new in ARGUMENTS.get(path, {}).items():
        if new is not None:
            first.setdefault(new, old)
    kept = {}
    for name, value in given.items():
        if name not in defaults or defaults[name] != value:
            kept[first.get(name, name)] = _without_defaults(value)
    return {"class_path": first_path(path), "init_args": kept}


def defaults_of(path: str) -> dict[str, Any]:
    """Described default of each argument that has one; none for a class that this version does not
    know.
    """
    try:
        parameters = inspect.signature(resolve(path)).parameters
    except UserError:
        return {}
    defaults = {}
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            defaults[name] = describe(parameter.default)
    return defaults


def _versions(model: nn.Module) -> dict[str, int]:
    """Versions above 1 of the classes that a model is made of, by their first paths."""
    versions = {}
    for part in model.modules():
        version = getattr(part, "encoding_version", 1)
        if version != 1:
            versions[first_path(class_path(type(part)))] = version
    return versions

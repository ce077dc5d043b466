"""In which constructor arguments two configs differ: what a source was made with, and what takes
its weights.
"""

from typing import Any

SHOWN = 60


def differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """For example `["width 16 there, 32 here"]`, nested arguments as `quantizer.dim`; empty for
    equal configs.

    An argument that only one side has is left out: another version wrote it.
    """
    if theirs == ours:
        return []
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return [f"{name} {_short(theirs)} there, {_short(ours)} here"]
    if theirs.get("class_path") != ours.get("class_path"):
        return [f"{name} {_class(theirs)} there, {_class(ours)} here"]
    if "init_args" in theirs and "init_args" in ours:
        return differences(theirs["init_args"], ours["init_args"], name)
    found: list[str] = []
    for key in theirs:
        if key in ours:
            found += differences(theirs[key], ours[key], f"{name}.{key}".lstrip("."))
    return found


def _class(config: dict[str, Any]) -> str:
    return str(config.get("class_path")).rpartition(".")[2]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return _class(value)
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."

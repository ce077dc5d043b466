"""The older spelling of sampling settings (names and dicts of options), and how the same is written
now.

It stands in YAML, on command lines and in records of version 0.1; nothing is drawn by it any more.
What a user wrote is answered by one line with the new spelling.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tessellar.errors import UserError

ALGORITHMS = {
    "ancestral": "Ancestral",
    "sjd": "SpeculativeJacobi",
    "sjd++": "ReusingJacobi",
    "gsd": "GroupedJacobi",
    "draft": "DraftModel",
    "maskgit": "MaskGIT",
}
SCHEDULES = {
    "constant": "Constant",
    "linear": "Linear",
    "cosine": "Cosine",
    "power_cosine": "PowerCosine",
    "half_linear": "HalfLinear",
    "half_cosine": "HalfCosine",
    "step": "Step",
    "late_step": "LateStep",
    "late_linear": "LateLinear",
    "interval": "Interval",
    "revealed": "Revealed",
}
SOLVERS = {"sde": "EulerMaruyama", "ode": "Euler"}
# Of records: options lay flat beside them.
FLAT = ("guidance_scale", "guidance_schedule")
CHOICE = ("temperature", "top_k", "top_p", "min_p")


def refuse_words(argv: Sequence[str]) -> None:
    """Raise UserError with the new spelling where words of a command line are in the older one."""
    old: list[str] = []
    new: list[str] = []
    for name, value in _options(argv):
        respelled = respell_option(name, value)
        if respelled is not None:
            old.append(shlex.join([f"--{name}", value]))
            new += respelled
    if old:
        raise UserError(f"{' '.join(old)} is the older spelling; it is now {shlex.join(new)}")


def refuse_config(config: Any, where: str) -> None:
    """Raise UserError with the new spelling where a YAML holds sampling settings in the older one,
    at any depth.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "sampling" and isinstance(value, Mapping):
                respelled = respell(value)
                if respelled is not None:
                    raise UserError(
                        f"{where}: sampling is in the older spelling; it is now sampling: {in_one_line(respelled)}"
                    )
            refuse_config(value, where)
    elif isinstance(config, list):
        for item in config:
            refuse_config(item, where)


def respell(sampling: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of a YAML or a record in the new spelling; None where they are in it already."""
    if any(key in sampling for key in FLAT):
        return respell_record(sampling)
    guidance = sampling.get("guidance")
    flow = sampling.get("flow")
    old_guidance = isinstance(guidance, Mapping) and (
        "schedule" in guidance or "options" in guidance
    )
    old_flow = isinstance(flow, Mapping) and "solver" in flow
    named = sampling.get("algorithm")
    old_algorithm = "options" in sampling or (isinstance(named, str) and named in ALGORITHMS)
    if not (old_guidance or old_flow or old_algorithm):
        return None
    result = {key: value for key, value in sampling.items() if key != "options"}
    if isinstance(guidance, Mapping) and old_guidance:
        rest = {key: value for key, value in guidance.items() if key not in ("schedule", "options")}
        name = guidance.get("schedule", "constant")
        result["guidance"] = _chosen(SCHEDULES, name, rest | dict(guidance.get("options") or {}))
    if old_algorithm:
        name = sampling.get("algorithm", "ancestral")
        result["algorithm"] = _chosen(ALGORITHMS, name, dict(sampling.get("options") or {}))
    if isinstance(flow, Mapping) and old_flow:
        rest = {key: value for key, value in flow.items() if key != "solver"}
        result["flow"] = _chosen(SOLVERS, flow["solver"], rest)
    return result


def respell_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of `samples.json` and of evaluations, where every setting was a key of its own."""
    known = (*FLAT, *CHOICE, "algorithm")
    prefixes = ("algorithm_", "flow_", "diffusion_")
    options = {k: v for k, v in record.items() if k not in known and not k.startswith(prefixes)}
    scale = record.get("guidance_scale", 1.0)
    result: dict[str, Any] = {
        "guidance": _chosen(
            SCHEDULES, record.get("guidance_schedule", "constant"), {"scale": scale} | options
        )
    }
    choice = {key: record[key] for key in CHOICE if key in record}
    if choice:
        result["choice"] = choice
    result["algorithm"] = _chosen(
        ALGORITHMS, record.get("algorithm", "ancestral"), _under("algorithm_", record)
    )
    flow = _under("flow_", record)
    if flow:
        result["flow"] = _chosen(SOLVERS, flow.pop("solver", "sde"), flow)
    diffusion = _under("diffusion_", record)
    if diffusion:
        result["diffusion"] = {"class_path": "AncestralDiffusion", "init_args": diffusion}
    return result


def _under(prefix: str, record: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    for key, value in record.items():
        if key.startswith(prefix):
            options[key.removeprefix(prefix)] = value
    return options


def _chosen(names: Mapping[str, str], name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {"class_path": names.get(str(name), str(name))}
    if options:
        chosen["init_args"] = dict(options)
    return chosen


def respell_option(name: str, value: str) -> list[str] | None:
    """Words for one option of the command line; None where it is not in the older spelling."""
    before, dot, bare = name.rpartition("sampling.")
    prefix = before + dot
    if bare == "algorithm" and value in ALGORITHMS:
        return [f"--{prefix}algorithm", ALGORITHMS[value]]
    if bare == "guidance.schedule":
        return [f"--{prefix}guidance", SCHEDULES.get(value, value)]
    if bare == "flow.solver":
        return [f"--{prefix}flow", SOLVERS.get(value, value)]
    for old, new in (("options", "algorithm"), ("guidance.options", "guidance")):
        if bare == old:
            return each_option(f"--{prefix}{new}", value)
        if bare.startswith(f"{old}."):
            return [f"--{prefix}{new}.{bare.removeprefix(f'{old}.')}", value]
    return None


def each_option(option: str, value: str) -> list[str]:
    """`--algorithm.window 32 ...` of a YAML dict of options."""
    try:
        options = yaml.safe_load(value)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        return [f"{option}.NAME", "VALUE"]
    words: list[str] = []
    for key, given in options.items():
        words += [f"{option}.{key}", in_one_line(given)]
    return words


def _options(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Options of a command line with their values ("" where none follows)."""
    if not argv:
        return []
    found = []
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, value if equals else after))
    return found


def in_one_line(value: Any) -> str:
    """YAML in one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
        .removesuffix("...\n")
        .strip()
    )

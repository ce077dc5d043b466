"""The header that our training modules write into Lightning checkpoints, so that a `.ckpt`
describes its own model.

`checkpoint["tessellar"]` is a JSON string: the format number, the kind, and the config of each
part. With it a checkpoint is loaded with `weights_only=True`, without the YAML of the run that
wrote it.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tessellar.checkpoints.weights import part_of
from tessellar.errors import UserError
from tessellar.protocol.condition import Conditioner
from tessellar.protocol.configured import Configured
from tessellar.protocol.generator import Generator
from tessellar.protocol.moved import renewed
from tessellar.protocol.tokenizer import Tokenizer

HEADER_KEY = "tessellar"
CLASS_NAMES = "class_names"  # of an export's description: the name of class k at place k
AVERAGED = "averaged"  # of a checkpoint's: the part that averages are kept of
FORMAT = 1
PARTS = ("tokenizer", "generator", "conditioner", "discriminator")
# Where our training modules keep the parts in their state dicts. The EMA callback averages the part
# that the kind is named after, unless a checkpoint says another one.
PREFIXES = {
    "tokenizer": {"tokenizer": "tokenizer.", "discriminator": "loss.discriminator."},
    "generator": {
        "tokenizer": "model.tokenizer.",
        "generator": "model.generator.",
        "conditioner": "model.conditioner.",
    },
}
WHOLE = "model"  # averages may be of the whole model of a generator, tokenizer included
REQUIRED = {"tokenizer": ("tokenizer",), "generator": ("tokenizer", "generator", "conditioner")}


def describe_model(
    tokenizer: Tokenizer,
    generator: Generator | None = None,
    conditioner: Conditioner | None = None,
    discriminator: nn.Module | None = None,
) -> dict[str, Any]:
    """Format, kind and part configs, plain data; what exports and checkpoint headers hold.

    The kind is `generator` where a generator is given (its conditioner is needed then), else
    `tokenizer`. A discriminator that is not Configured cannot be rebuilt, so it is left out.
    """
    assert (generator is None) == (conditioner is None), (
        "a generator and its conditioner come together"
    )
    kind = "tokenizer" if generator is None else "generator"
    modules = dict(zip(PARTS, (tokenizer, generator, conditioner, discriminator), strict=True))
    described: dict[str, Any] = {"format": FORMAT, "kind": kind}
    for part, module in modules.items():
        if isinstance(module, Configured):
            described[part] = module.config
    return described


def checkpoint_header(parts: Mapping[str, nn.Module | None], averaged: str | None = None) -> str:
    """The header as the JSON string that `on_save_checkpoint` puts under `checkpoint[HEADER_KEY]`;
    `averaged` names the part that averages are kept of, where it is not the kind's own.
    """
    description = describe_model(**parts)  # type: ignore[arg-type]
    if averaged is not None and averaged != description["kind"]:
        description[AVERAGED] = averaged
    return json.dumps(description)


def check_config(config: Any, where: str) -> dict[str, Any]:
    """The description of a model as read from a file; raises UserError where it is not one, or of a
    newer format.
    """
    if (
        not isinstance(config, dict)
        or "format" not in config
        or str(config.get("kind")) not in REQUIRED
    ):
        raise UserError(f"{where} does not describe a tessellar model (no format, or unknown kind)")
    if config["format"] != FORMAT:
        raise UserError(
            f"{where} has format {config['format']!r}; this version reads format {FORMAT}: install a newer tessellar"
        )
    missing = [part for part in REQUIRED[config["kind"]] if part not in config]
    if missing:
        raise UserError(f"{where} describes a {config['kind']} without its {', '.join(missing)}")
    averaged = str(config.get(AVERAGED, config["kind"]))
    if averaged not in _averageable(config["kind"]):
        raise UserError(f"{where}: averages of {averaged!r:.40}, which is no part of the model")
    names = config.get(CLASS_NAMES, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {CLASS_NAMES} must be a list of texts")
    return {name: renewed(value) if name in PARTS else value for name, value in config.items()}


def _averageable(kind: str) -> dict[str, str]:
    """Prefixes of what averages may be kept of."""
    return PREFIXES[kind] | ({WHOLE: "model."} if kind == "generator" else {})


def checkpoint_tensors(
    content: dict[str, Any],
    description: dict[str, Any],
    raw: bool,
    where: str,
    ema: float | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Tensors of a Lightning checkpoint under their part's prefix, and which weights they are:
    `ema` or `raw`.

    Averaged weights replace the raw ones where the checkpoint has any, unless `raw` is asked for;
    `ema` is the decay of those wanted, where a run keeps several.
    What belongs to no part (losses, metrics) is left out.
    """
    state = content.get("state_dict")
    kind = description["kind"]
    if not isinstance(state, dict):
        raise UserError(f"{where} holds no weights: training did not write it, or it is damaged")
    averages = {} if raw else averages_in(content)
    if ema is not None:
        averages = averages_of(content, ema, where)
    if not isinstance(averages, dict):
        raise UserError(f"{where}: its averages are a {type(averages).__name__}, not weights")
    if not all(isinstance(name, str) for name in (*state, *averages)):
        raise UserError(f"{where}: names of its weights are no texts")
    merged = dict(state)
    averaged = _averageable(kind)[description.get(AVERAGED, kind)]
    for name, tensor in averages.items():
        merged[averaged + name] = tensor
    tensors = {}
    for part, prefix in PREFIXES[kind].items():
        if part in description:
            for name, tensor in part_of(merged, prefix).items():
                tensors[f"{part}.{name}"] = tensor
    return tensors, "ema" if averages else "raw"


def averages_of(content: dict[str, Any], ema: float, where: str) -> Any:
    """Averages of the decay `ema`; raises UserError, listing those that are kept, for another."""
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    for state in states:
        if not isinstance(state, dict) or "average" not in state:
            continue
        further = state.get("further", {})
        kept = {state.get("decay"): state["average"]}
        if isinstance(further, dict):
            kept |= {_number(decay): averages for decay, averages in further.items()}
        if ema in kept:
            return kept[ema]
        there = ", ".join(str(decay) for decay in kept)
        raise UserError(f"{where} keeps no averages of decay {ema:g}; it has {there}")
    raise UserError(f"{where} keeps no averaged weights")


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def left_out_of(content: dict[str, Any], description: dict[str, Any]) -> tuple[str, ...]:
    """What a Lightning checkpoint holds besides its parts, for example `loss.lecam` and `optimizer
    states`.
    """
    prefixes = PREFIXES[description["kind"]]
    kept = tuple(prefixes[part] for part in prefixes.keys() & description.keys())
    modules = set()
    for name in content["state_dict"]:
        if not name.startswith(kept):
            modules.add(".".join(name.split(".")[:-1][:2]) or name)
    states = ["optimizer states"] if content.get("optimizer_states") else []
    return (*sorted(modules), *states)


def averages_in(content: dict[str, Any]) -> Any:
    """What the EMA callback saved, names relative to the module that it averages; empty without
    one.
    """
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    for state in states:
        if isinstance(state, dict) and "average" in state:
            return state["average"]
    return {}

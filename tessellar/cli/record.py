"""`convert.py record`: a recording of a module of one's own, with which others can verify theirs."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.staging import check_target
from tessellar.errors import UserError
from tessellar.parity.own import record_module
from tessellar.parity.recorder import META, Recorder
from tessellar.pipeline import assemble
from tessellar.protocol.packages import is_trusted, trust
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.run import check_seed


def record(
    module: str,
    out: str = "",
    count: int = 2,
    seed: int = 0,
    system: str = "",
    raw: bool = False,
    package: str = "",
    overwrite: bool = False,
) -> None:
    """Make a recording (meta.json, io.safetensors, weights) that `verify` replays.

    Args:
        module: what is recorded: an export folder, .safetensors, .ckpt or hub id; or the path of a class or function
            of your package that makes a tokenizer or generator (mypackage.toy_s); or the path of a function, or of a
            module with a function record, that takes a tessellar.parity.recorder.Recorder and records official outputs
        out: folder of the recording
        count: images or samples
        seed: of fresh weights and of inputs
        system: name of the system, whose replays lie in your parity.py (default for such a function: its package)
        raw: of a checkpoint, weights of the last step instead of the averaged ones
        package: your package, where the module is of one; several are separated by commas
        overwrite: replace an older recording
    """
    trust(package)
    if not out:
        raise UserError("say where to write: --out FOLDER")
    check_whole("--count", count, least=1, most=10_000)
    check_seed(seed)
    if system and not system.isidentifier():
        raise UserError(f"--system is {system!r}; a system has the name of a package, such as var")
    check_target(Path(out), META, overwrite)
    torch.manual_seed(seed)
    made = _made(module, raw)
    if isinstance(made, nn.Module):
        recorder, left_out = record_module(made, count, seed)
        for name in left_out:
            print(f"left out: {name} depends on chance, it was not the same twice")
    else:
        recorder = Recorder(module.partition(".")[0], source=module)
        made(recorder)
    recorder.system = system or recorder.system
    recorder.write(out, overwrite)
    print(f"wrote {out}")


def _made(path: str, raw: bool) -> nn.Module | Callable[[Recorder], Any]:
    """The module at a path, or the function that records."""
    names = path.split(".")
    if (
        Path(path).exists()
        or "/" in path
        or not all(name.isidentifier() for name in names)
        or len(names) < 2
    ):
        return assemble(read_source(path, raw=raw))
    if not is_trusted(path):
        raise UserError(f"{path} is of the package {names[0]!r}: name it, --package {names[0]}")
    found = found_at(path)
    function = getattr(found, "record", None) if inspect.ismodule(found) else found
    if not callable(function):
        raise UserError(
            f"{path} is neither a class nor a function, nor a module with a function record"
        )
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if len(needed) == 1 and needed[0].annotation in (Recorder, "Recorder"):
        return function
    if needed:
        names_of = ", ".join(parameter.name for parameter in needed)
        raise UserError(
            f"{path} needs {names_of}: name a function that makes the module without arguments"
        )
    made = function()
    if not isinstance(made, nn.Module):
        raise UserError(f"{path} made a {type(made).__name__}, not a module")
    return made


def found_at(path: str) -> Any:
    """The Python module at a path, or what its last name is in the module before it."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"there is no {path} ({error})") from error

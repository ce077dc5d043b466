"""What to do after a command has ended: the commands, to be pasted."""

import shlex
from pathlib import Path
from typing import Any

from tessellar.cli.spelling import spelled
from tessellar.pipeline import ImageGenerator
from tessellar.text.conditioners import TextConditioner


def after_export(model: Any, out: str) -> str:
    """What an export is good for."""
    place = shlex.quote(out)
    if isinstance(model, ImageGenerator):
        return f"next: {spelled('sample')} {place} --out outputs/samples"
    return f"next: {spelled('evaluate')} model {place} --data CLASS --data.root FOLDER"


def after_cache(out: str) -> str:
    """How training reads a cache of tokens."""
    return (
        f"next: {spelled('train')} --config CONFIG --model.tokenizer TOKENIZER "
        f"--data tessellar.data.CachedTokensData --data.root {shlex.quote(out)}"
    )


def next_steps(module: Any, run: Path) -> list[str]:
    """Lines on what a finished run is good for: drawing, measuring, training a generator on it."""
    export = shlex.quote(str(run / "export"))
    model = getattr(module, "model", None)
    if not isinstance(model, ImageGenerator):
        return [
            f"next: measure it: {spelled('evaluate')} model {export}",
            f"      train a generator on it: {spelled('train')} --config CONFIG "
            f"--model.tokenizer {export} (tessellar list configs)",
        ]
    asked = " --prompts PROMPTS.txt" if isinstance(model.conditioner, TextConditioner) else ""
    out = shlex.quote(f"outputs/{run.name}")
    return [
        f"next: draw samples: {spelled('sample')} {export}{asked} --out {out}",
        f"      measure it: {spelled('evaluate')} model {export} --count 10000",
    ]

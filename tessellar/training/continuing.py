"""What a resumed run says and keeps: where it goes on, which settings differ, the config and
command of every part.

`config.yaml` is that of the part that runs or ran last; those before it are `config.0.yaml`,
`config.1.yaml`, ...
"""

import logging
import re
from pathlib import Path
from typing import Any

import yaml

from tessellar.checkpoints.kinds import look_into
from tessellar.errors import UserError, writing

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
#: Keys that say how a part was called, not what was trained.
OF_THE_CALL = ("config", "name", "resume", "wandb")
#: What a model is made of: a checkpoint does not fit anything else.
PARTS_OF_A_MODEL = ("model.tokenizer.", "model.generator.", "model.conditioner.")
SHOWN = 8


def say_where(checkpoint: Path, max_steps: int) -> None:
    """One line: after which update of which file the run goes on."""
    # Reads no tensor.
    content = look_into(checkpoint)
    update = int(content.get("global_step", 0))
    if 0 <= max_steps <= update:
        log.info(
            "already at %d of %d updates: raise --trainer.max_steps to go on", update, max_steps
        )
    else:
        log.info("goes on after update %d of %s", update, checkpoint)


def compare_settings(before: Path, now: str) -> None:
    """Say in one line which settings differ from those in the config file `before`; all of them
    apply from here on.

    Raises UserError where the model would be another one. A setting that only one of the two knows
    is of another version and is not compared.
    """
    try:
        old = flat(yaml.safe_load(before.read_text()))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return  # a run without a config that can be read: nothing to compare with
    new = flat(yaml.safe_load(now))
    changed = [
        key
        for key in old.keys() & new.keys()
        if old[key] != new[key] and not key.startswith(OF_THE_CALL)
    ]
    for key in sorted(changed):
        if key.startswith(PARTS_OF_A_MODEL) and not key.endswith("class_path"):
            raise UserError(
                f"{key} is {new[key]!r}, the run has {old[key]!r} ({before}): that is another model; "
                "start it under another --name, with --model.init_from where weights shall be taken along"
            )
    if changed:
        named = [f"{key} {old[key]!r} -> {new[key]!r}" for key in sorted(changed)[:SHOWN]]
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        log.info(
            "settings that differ from %s and apply from now on: %s%s",
            before,
            ", ".join(named),
            more,
        )


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted keys, as options spell them (without `init_args`)."""
    if not isinstance(config, dict):
        return {prefix: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key == "init_args" else ".".join(filter(None, (prefix, str(key))))
        found |= flat(value, name) if value else {name: value}
    return found


def keep_config(folder: Path, text: str, command: str) -> int:
    """Write this part's config.yaml; that of the part before is kept under its number. Returns this
    part's number.
    """
    target = folder / CONFIG
    number = len(
        [path for path in folder.iterdir() if re.fullmatch(r"config\.\d+\.yaml", path.name)]
    )
    staged = folder / f"{CONFIG}.tmp"
    with writing(target, unfinished=staged):
        staged.write_text(f"# {command}\n{text}", errors="backslashreplace")
        if target.exists():
            target.replace(folder / f"config.{number}.yaml")
            number += 1
        staged.replace(target)
    return number

"""Answers sampling settings in the older spelling, on a command line and in the YAML that it names,
before parsing.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from tessellar.errors import UserError
from tessellar.sampling.older import in_one_line, refuse_config, refuse_words, respell


def refuse_older(argv: Sequence[str]) -> None:
    """Raise UserError, in one line, with the new spelling of what is in the older one."""
    refuse_words(argv)
    for path in configs_of(argv):
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser says it better
        refuse_config(config, path)
        # sample.py's own settings are not nested.
        flat = respell(config) if isinstance(config, dict) else None
        if flat is not None:
            raise UserError(
                f"{path}: sampling is in the older spelling; it is now {in_one_line(flat)}"
            )


def configs_of(argv: Sequence[str]) -> list[str]:
    """Files behind `--config`."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    return [
        b if a == "--config" else a.partition("=")[2]
        for a, b in pairs
        if a.split("=")[0] == "--config"
    ]

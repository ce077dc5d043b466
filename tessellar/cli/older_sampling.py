"""Answers sampling settings in the older spelling, on a command line and in the YAML that it names,
before parsing; and YAML that no parser should be given.
"""

from collections.abc import Sequence
from pathlib import Path

from tessellar.errors import UserError, check_is_file
from tessellar.plain_data import Repeated, Unbounded, read_yaml
from tessellar.sampling.older import in_one_line, refuse_config, refuse_words, respell

#: Pipes that a shell makes for one command, `--config <(...)`: read once, by the parser.
OF_THE_SHELL = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


def refuse_older(argv: Sequence[str]) -> None:
    """Raise UserError, in one line, with the new spelling of what is in the older one."""
    refuse_words(argv)
    for path in configs_of(argv):
        if not path.startswith(OF_THE_SHELL):
            check_is_file(path)
        try:
            config = read_yaml(Path(path))
        except (Unbounded, Repeated):
            raise
        except (UserError, ValueError):
            continue  # the parser says it better
        _refuse_zero_bytes(config, path)
        refuse_config(config, path)
        # sample.py's own settings are not nested.
        flat = respell(config) if isinstance(config, dict) else None
        if flat is not None:
            raise UserError(
                f"{path}: sampling is in the older spelling; it is now {in_one_line(flat)}"
            )


def _refuse_zero_bytes(config: object, where: str) -> None:
    """Raise UserError for a text that no file can be called by."""
    if isinstance(config, dict):
        for key, value in config.items():
            _refuse_zero_bytes(value, f"{where}: {key}")
    elif isinstance(config, list):
        for value in config:
            _refuse_zero_bytes(value, where)
    elif isinstance(config, str) and "\0" in config:
        raise UserError(f"{where} is {config[:40]!r}, which holds a zero byte")


def configs_of(argv: Sequence[str]) -> list[str]:
    """Files behind `--config`."""
    found = []
    for word, after in zip(argv, [*argv[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option == "--config":
            found.append(value if equals else after)
    return found

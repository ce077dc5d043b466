"""`tessellar train|sample|evaluate|convert ...`, and the entry of the four scripts at the
checkout's root.

A command's module is imported only when it is called, so that help and mistakes are answered at
once.
"""

import importlib
import logging
import sys
from typing import NoReturn

from tessellar.cli.errors import run
from tessellar.cli.nearest import nearest
from tessellar.errors import UserError, in_one_line

COMMANDS = {
    "train": "train a tokenizer or a generator from a YAML",
    "sample": "make images with a trained generator",
    "evaluate": "measure a tokenizer, a generator, or folders of images",
    "convert": "import official checkpoints, verify them, make and inspect exports",
}


def main(command: str | None = None) -> NoReturn:
    """Run `command` with the process's arguments (default: the first of them names it), then exit."""
    show_log()
    sys.exit(run(lambda: dispatch(command, sys.argv[1:])))


def show_log() -> None:
    """Print what our modules log (from INFO up) to stderr, bare; other packages' loggers stay as
    they are.
    """
    log = logging.getLogger("tessellar")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLine())
        log.addHandler(handler)


class OneLine(logging.Formatter):
    """A record is one line, whatever the names in it."""

    def format(self, record: logging.LogRecord) -> str:
        return in_one_line(record.getMessage())


def dispatch(command: str | None, argv: list[str]) -> int | None:
    """Call `tessellar.cli.<command>.main(argv)`; raises UserError for an unknown command."""
    if command is None:
        if not argv or argv[0] in ("-h", "--help"):
            print(usage())
            return 0 if argv else 2
        command = argv[0]
        argv = argv[1:]
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS, listed=0)
        raise UserError(f"{command!r} is not a command; there are {', '.join(COMMANDS)}{hint}")
    return importlib.import_module(f"tessellar.cli.{command}").main(argv)


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<9} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: tessellar COMMAND ...", "", *lines, "", "tessellar COMMAND --help says more."]
    )

"""`tessellar train|sample|evaluate|convert|... ...`, and the entry of the four scripts at the
checkout's root.

A command is a line in COMMANDS and a module `tessellar.cli.<command>` with its `main(argv)`; its
help is read from the function of its name there (`pages.py`). The module is imported only when the
command is called, so that help and mistakes are answered at once.
"""

import importlib
import logging
import platform
import sys
from importlib.metadata import version
from typing import NoReturn

from tessellar.cli.catalogue import KINDS
from tessellar.cli.errors import run
from tessellar.cli.listing import list_main, show_main
from tessellar.cli.pages import page, wants_all
from tessellar.errors import UserError, in_one_line
from tessellar.progress import BesideBar
from tessellar.protocol.nearest import nearest

SCRIPTS = {
    "train": "train a tokenizer or a generator from a YAML",
    "sample": "make images with a trained generator",
    "evaluate": "measure a tokenizer, a generator, or folders of images",
    "convert": "import official checkpoints, verify them, make and inspect exports",
}
COMMANDS = {
    **SCRIPTS,
    "sweep": "try learning rates and batch sizes by short runs of training",
    "report": "one HTML page of a run, or of several side by side",
    "demo": "a page in the browser: draw, watch, in-paint, reconstruct, compare",
    "serve": "serve images over HTTP, as OpenAI's images endpoint does",
    "push": "upload an export to the Hugging Face hub, with a card; shows it first",
    "data": "prepare a data set that was downloaded: ImageNet",
    "list": "name all tokenizers, generators, data, configs, algorithms or weights",
    "show": "say what one of them is, or a run",
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
        handler = BesideBar()
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
    if "--version" in (command, *argv):
        print(versions())
        return 0
    if command in ("list", "show") and {"-h", "--help"} & set(argv):
        print(usage())
        return 0
    if command == "list":
        return list_main(argv)
    if command == "show":
        return show_main(argv)
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS, listed=0)
        raise UserError(f"{command!r} is not a command; there are {', '.join(COMMANDS)}{hint}")
    text = page(command, argv)
    if text is not None:
        print(text)
        return 0
    return importlib.import_module(f"tessellar.cli.{command}").main(wants_all(argv))


def versions() -> str:
    """This package's version, and those of what it stands on."""
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return f"tessellar {version('tessellar')} ({others}, Python {platform.python_version()})"


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<9} {what}" for name, what in COMMANDS.items()]
    kinds = ", ".join(KINDS)
    return "\n".join(
        [
            "usage: tessellar COMMAND ...",
            "",
            *lines,
            "",
            f"tessellar list KIND [PATTERN], of {kinds}; tessellar show NAME",
            "tessellar COMMAND --help says more, tessellar --version which version this is.",
            "",
            "first steps:",
            "  tessellar train --config demo/tokenizer",
            "  tessellar train --config demo/generator",
            "  tessellar sample runs/demo-generator/export --per-class 8 --guidance.scale 2",
        ]
    )

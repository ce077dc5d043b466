"""A step of the first hour: one command of a user, what it should do, and what came of it.

Commands are started in a copy of this process (`fork`) that has imported the package already: the same script with the
same words, without ten CPU-seconds of imports each time.
"""

import os
import re
import runpy
import select
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LONGEST = 300  # seconds of a step


@dataclass
class Step:
    """One command of a user and what it should do.

    `words` are a script with its words, or -c with code, or -m with a module. `says` are regular expressions of its
    output, `never` such that must not appear, `makes` files that are there afterwards. `interrupt` sends Ctrl-C
    `patience` seconds after its expression has appeared. `screen` names the text that pages show.
    """

    title: str
    words: list[str]
    code: int = 0
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ("Traceback",)
    makes: tuple[str, ...] = ()
    interrupt: str = ""
    patience: float = 1.0
    screen: str = ""
    before: Callable[[], None] | None = None


@dataclass
class Outcome:
    """What came of a step."""

    step: Step
    output: str
    cpu_seconds: float
    wrong: list[str] = field(default_factory=list)


def run(step: Step) -> Outcome:
    """Run a step and compare."""
    if step.before is not None:
        step.before()
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(read)
        _become(step.words, write)
    os.close(write)
    output = _listen(read, process, step)
    _, status, used = os.wait4(process, 0)
    outcome = Outcome(step, output, used.ru_utime + used.ru_stime)
    outcome.wrong = list(_differences(step, os.waitstatus_to_exitcode(status), output))
    return outcome


def _become(words: list[str], write: int) -> None:
    """In the copy: run the command with its output in the pipe, then leave."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code: object = 0
    try:
        _execute(words)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _execute(words: list[str]) -> None:
    """What `python WORDS` does."""
    match words:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case _:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")


def _listen(read: int, process: int, step: Step) -> str:
    """All that the process writes; Ctrl-C is sent when the step says, and an end after LONGEST seconds."""
    said = b""
    interrupt = step.interrupt
    due = float("inf")
    end = time.monotonic() + LONGEST
    while True:
        now = time.monotonic()
        if now > due:
            os.killpg(process, signal.SIGINT)
            due = float("inf")
            interrupt = ""
        if now > end:
            os.killpg(process, signal.SIGKILL)
        ready, _, _ = select.select([read], [], [], 0.02)
        if not ready:
            continue
        part = os.read(read, 65536)
        if not part:
            os.close(read)
            return said.decode(errors="replace")
        said += part
        if (
            interrupt
            and due == float("inf")
            and re.search(interrupt, said.decode(errors="replace"))
        ):
            due = now + step.patience


def _differences(step: Step, code: int, output: str) -> list[str]:
    """What is not as the step expects."""
    found = []
    if code != step.code:
        found.append(f"exit code {code}, not {step.code}")
    found += [f"does not say {wanted!r}" for wanted in step.says if not re.search(wanted, output)]
    found += [f"says {unwanted!r}" for unwanted in step.never if re.search(unwanted, output)]
    found += [f"{path} is not there" for path in step.makes if not Path(path).exists()]
    return found


def shown(outcome: Outcome) -> str:
    """A command with its output as pages show it, without colours and what a bar wrote over."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", outcome.output)
    lines = [line.rpartition("\r")[2].rstrip() for line in plain.splitlines()]
    match outcome.step.words:
        case ["-c", code, *rest]:
            command = f"tessellar {shlex.join(rest)}" if rest else code.strip()
        case words:
            command = f"python {shlex.join(words)}"
    return "\n".join([f"$ {command}", *filter(None, lines)])

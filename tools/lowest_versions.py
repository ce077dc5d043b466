"""Install the lowest versions that pyproject.toml declares into an environment of their own, and run the tests there.

    python tools/lowest_versions.py                      # the whole suite; part of `make check`
    python tools/lowest_versions.py -- tests/interop -x  # some of it

A lower bound that was never installed is a guess: packages drop and add arguments between versions, and a bound may
admit a version with a hole that a later one closed. What a package itself needs is left to pip.
"""

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?P<extras>\[[\w,]+\])?>=(?P<version>[\w.]+)$")
# Tools that look at the source and run no test: their versions cannot break a user.
UNUSED = ("build", "pyright", "ruff")


def lowest(requirements: Iterable[str]) -> list[str]:
    """`name==version` of each `name>=version`; raises SystemExit for a requirement without a bound."""
    pins = []
    for requirement in requirements:
        found = BOUND.match(requirement.replace(" ", ""))
        if found is None:
            raise SystemExit(
                f"pyproject.toml: {requirement!r} has no lower bound of the form name>=version"
            )
        if found["name"] not in UNUSED:
            pins.append(f"{found['name']}{found['extras'] or ''}=={found['version']}")
    return pins


def declared(extras: Iterable[str], project: Path = ROOT / "pyproject.toml") -> list[str]:
    """Requirements of the package and of some of its extras."""
    content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    named = [content["optional-dependencies"][extra] for extra in extras]
    return [*content["dependencies"], *(item for group in named for item in group)]


def install(folder: Path, pins: list[str]) -> Path:
    """The Python of an environment in `folder` with the pinned versions and this package (editable)."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # An older version is asked for under two bounds where an extra repeats a dependency: the later one counts.
    by_name = {re.split(r"[\[=]", pin)[0]: pin for pin in pins}
    subprocess.run([*pip, *by_name.values()], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-lowest")
    parser.add_argument("--extras", nargs="*", default=["dev"])
    parser.add_argument("tests", nargs="*", help="arguments of pytest (default: the whole suite)")
    given = parser.parse_args()
    pins = lowest(declared(given.extras))
    print("\n".join(pins))
    python = install(given.folder, pins)
    return subprocess.run([str(python), "-m", "pytest", "-q", *given.tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())

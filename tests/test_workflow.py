"""Commands of the workflow, the Makefile, the hooks and CONTRIBUTING exist and agree; versions are one everywhere."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = dict(re.findall(r"^([a-z]+):[^#\n]*## (.+)$", MAKEFILE, re.M))


def jobs(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]


def commands() -> list[str]:
    """What the steps of all jobs run."""
    steps = [step for file in WORKFLOWS for job in jobs(file).values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def missing(command: str) -> str | None:
    """What a command names that is not in this checkout."""
    words = shlex.split(command.replace("$(PY)", "python").replace("$(CURDIR)", "."))
    while words and ("=" in words[0] or words[0] == "@"):
        words = words[1:]
    if words[0] == "make":
        return None if words[1] in TARGETS else f"make {words[1]}"
    if words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
        words = [words[0], words[2].replace(".", "/") + ".py"]
    scripts = [word for word in words if re.search(r"\.(py|sh)$", word) and "*" not in word]
    absent = [script for script in scripts if not (ROOT / script).is_file()]
    return absent[0] if absent else None


def recipes() -> list[str]:
    """Lines of the Makefile's recipes that name a script or a module."""
    lines = re.findall(r"^\t@?(.+)$", MAKEFILE, re.M)
    return [line for line in lines if re.search(r"\.(py|sh)\b|-m benchmarks", line)]


def test_the_workflow_runs_lint_tests_docs_and_the_lowest_versions() -> None:
    run = commands()
    wanted = ("make lint", "make test PYTHON=python", "make docs", "make check")
    assert set(wanted) | {"python tools/lowest_versions.py", "bash tools/docker.sh cpu"} <= set(run)


@pytest.mark.parametrize("command", [*commands(), *recipes()])
def test_what_a_command_names_is_there(command: str) -> None:
    assert missing(command) is None


def test_a_command_that_is_not_there_is_noticed() -> None:
    assert missing("make tests") == "make tests"
    assert missing("OMP_NUM_THREADS=1 $(PY) -m benchmarks.gone --attacks 8") == "benchmarks/gone.py"
    assert missing("bash tools/gone.sh cpu") == "tools/gone.sh"


def test_every_target_is_phony_and_explained_and_contributing_names_no_other() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)
    assert phony and set(phony[1].split()) == set(TARGETS)
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named: set[str] = set()
    for page in pages:
        named |= set(re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8")))
    assert {"test", "lint", "docs"} <= named <= set(TARGETS)


def test_the_matrix_is_what_the_project_says_of_python() -> None:
    (workflow,) = WORKFLOWS
    tested = jobs(workflow)["test"]["strategy"]["matrix"]["python"]
    said = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert tested == said
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert said == [f"3.{minor}" for minor in range(int(low), int(high))]


def test_hooks_run_what_lint_runs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = MAKEFILE[MAKEFILE.index("\nlint:") : MAKEFILE.index("\nformat:")]
    for hook in repo["hooks"]:
        tool = hook["entry"].removeprefix(".venv/bin/python ").removesuffix(" --force-exclude")
        there = tool in lint or tool == "tools/systems.py"  # which is a test
        assert there and missing(hook["entry"]) is None


def test_templates_of_issues_are_forms() -> None:
    templates = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
    forms = [yaml.safe_load(f.read_text()) for f in templates if f.name != "config.yml"]
    assert len(forms) == 3
    for form in forms:
        assert form["name"] and form["description"]
        labels = [field["attributes"]["label"] for field in form["body"]]
        assert len(labels) == len(set(labels)) and all("id" in field for field in form["body"])


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", changelog, re.M)
    assert versions[0] == PROJECT["version"] == citation["version"]
    assert versions == sorted(versions, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    names = [author["name"] for author in citation["authors"]]
    assert names == [author["name"] for author in PROJECT["authors"]]


def test_the_image_copies_what_a_wheel_needs_and_takes_the_projects_pythons() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M) for word in line.split()
    ]
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(copied)
    assert {"tessellar", "tokenizers", "models", "configs"} <= set(copied)
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert set(copied) == set(kept) and all((ROOT / name).exists() for name in copied)
    (python,) = re.findall(r"^ARG PYTHON=(.+)$", dockerfile, re.M)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_documented_extras_exist() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    assert {"text", "docs", "dev"} <= named <= set(PROJECT["optional-dependencies"])

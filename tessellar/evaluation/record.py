"""One JSON record an evaluation: the numbers, everything that made them, and a fingerprint of what
must agree.

Two numbers are comparable iff the fingerprints of their records are equal. It covers the network,
the reference, the number of samples, the label plan, the protocol and the versions of the metrics;
not the model, its sampling settings or the seeds, which are what one wants to compare. A record of
several networks has a fingerprint for each: its numbers are comparable with those of any record
that has the same network under the same fingerprint.
"""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import indent
from typing import Any

from tessellar.checkpoints.card import commit
from tessellar.data.dataset import digest
from tessellar.errors import UserError, writing
from tessellar.plain_data import read_json

Record = dict[str, Any]
PACKAGES = ("tessellar", "torch", "timm", "torch-fidelity", "torchmetrics", "numpy")


def make_record(
    metrics: dict[str, float],
    comparable: dict[str, Any],
    samples: dict[str, Any],
    reference: dict[str, Any] | None,
    warnings: list[str],
    seconds: float,
) -> Record:
    """The record of an evaluation; `comparable` holds what must agree with another record: of one
    network, or under `networks` of each by its name.
    """
    parts: dict[str, Any] = {}
    if "networks" in comparable:
        each = comparable["networks"].items()
        parts["fingerprints"] = {name: digest(**facts) for name, facts in each}
    return {
        "metrics": metrics,
        "samples": samples,
        "reference": reference,
        "comparable": comparable,
        "fingerprint": digest(**comparable),
        **parts,
        "warnings": warnings,
        "seconds": round(seconds, 3),
        "code": {"commit": commit(), "versions": versions()},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a metric's value may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_record(record: Record, path: str | Path) -> None:
    """Write a record as JSON."""
    path = Path(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path, unfinished=staged):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        staged.replace(path)


def read_record(path: str | Path) -> Record:
    """Inverse of `write_record`; raises UserError for a file that is no record."""
    record = read_json(Path(path))
    if not isinstance(record, dict) or not {"metrics", "comparable", "fingerprint"} <= set(record):
        raise UserError(f"{path} is not a record of an evaluation")
    metrics = record["metrics"]
    sound = isinstance(metrics, dict) and isinstance(record["comparable"], dict)
    if not sound or not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise UserError(f"{path} is not a record of an evaluation: its metrics are no numbers")
    return record


def differences(a: Record, b: Record) -> list[str]:
    """What keeps two records from being comparable, one line each; empty if their fingerprints are
    equal, or those of the networks that both have.
    """
    if a["fingerprint"] == b["fingerprint"]:
        return []
    ours = networks_of(a)
    theirs = networks_of(b)
    if len(ours) == len(theirs) == 1:
        return _unequal(*ours.values(), *theirs.values())
    shared = [name for name in ours if name in theirs]
    if not shared:
        return [f"networks: {', '.join(ours)} / {', '.join(theirs)}"]
    lines = []
    for name in shared:
        lines += [f"{name}: {line}" for line in _unequal(ours[name], theirs[name])]
    return lines


def networks_of(record: Record) -> dict[str, dict[str, Any]]:
    """What must agree with another record, by network."""
    comparable = record["comparable"]
    networks = comparable.get("networks")
    if isinstance(networks, dict) and all(isinstance(part, dict) for part in networks.values()):
        return networks
    extractor = comparable.get("extractor")
    name = extractor.get("name") if isinstance(extractor, dict) else ""
    return {str(name): comparable}


def _unequal(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    ours = _flat(ours)
    theirs = _flat(theirs)
    lines = []
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            lines.append(f"{key}: {ours.get(key)} / {theirs.get(key)}")
    return lines


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        leaves |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return leaves


def summary(record: Record) -> str:
    """One line: `FD(fmnist-resnet10t) 2.23  accuracy 0.920  (N=10000, reference=fashion-mnist train
    60000)`.
    """
    values = "  ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
    reference = record["reference"]
    against = (
        f", reference={reference['name']} {reference['images'] or ''}".rstrip() if reference else ""
    )
    return f"{values}  (N={record['samples']['images']}{against})"


def compare(a: Record, b: Record, names: tuple[str, str] = ("a", "b")) -> str:
    """A table of the metrics of two records, headed by whether they are comparable, and if not,
    why.
    """
    reasons = differences(a, b)
    verdict = ["comparable"]
    if reasons:
        verdict = ["NOT comparable; these differ:", indent("\n".join(reasons), "  ")]
    metrics = {**a["metrics"], **b["metrics"]}
    width = max(map(len, metrics), default=0)
    rows = [f"{'':{width}}  {names[0]:>12}  {names[1]:>12}"]
    for name in metrics:
        rows.append(f"{name:{width}}  {_cell(a, name)}  {_cell(b, name)}")
    return "\n".join([*verdict, *rows])


def _cell(record: Record, name: str) -> str:
    return f"{record['metrics'][name]:12.5g}" if name in record["metrics"] else f"{'-':>12}"

"""Replay a folder of recorded official outputs with our modules and compare every one of them
within its tolerance.

|ours - theirs| <= atol + rtol |theirs|; both zero means exactly equal. Where a computation makes
its own roundings larger than that (a replay measures it: `Recording.grown`), GROWN times their
reach is added. A replay must read every recorded input and
weight file and produce every output: what is left over is listed and counts as a failure. Cases out
of this project's scope are named and counted, with the reason.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.recording import Entry, Recording, dtype_name, read_recording
from tessellar.parity.registration import OUT_OF_SCOPE, Replay, replays_of, systems

GROWN = 4  # reaches: processors differ by more than the few roundings that are tried


class UnknownSystem(UserError):
    """The recording is of a system that nothing here can replay."""


@dataclass(frozen=True)
class Comparison:
    """One output: its largest error in terms of the tolerance at that place, and what is wrong
    beyond numbers.
    """

    name: str
    case: str
    error: float
    tolerance: float
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A case that is not replayed, with the number of its outputs and the reason."""

    case: str
    outputs: int
    reason: str

    def __str__(self) -> str:
        return f"case {self.case}, {self.outputs} outputs: {self.reason}"


@dataclass
class Report:
    """What came of one folder; `leftovers` are lines about anything unread, uncompared or
    unrecorded, `out_of_scope` the cases that are not replayed here.
    """

    folder: str
    system: str
    comparisons: list[Comparison] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    out_of_scope: list[LeftOut] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something was compared, all of it agrees, and nothing is left over."""
        compared = bool(self.comparisons) and all(c.passed for c in self.comparisons)
        return compared and not self.leftovers

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for machines."""
        outputs = [asdict(c) for c in self.comparisons]
        return {
            "folder": self.folder,
            "system": self.system,
            "passed": self.passed,
            "outputs": outputs,
            "leftovers": self.leftovers,
            "out_of_scope": [asdict(case) for case in self.out_of_scope],
        }


def verify(
    folder: str | Path, cases: Iterable[str] | None = None, packages: Sequence[str] = ()
) -> Report:
    """Replay and compare a folder, or some of its cases; `packages` are others' that hold replays.

    Raises UnknownSystem for a system without a replay, UserError for an unknown case or what is not
    a recording.
    """
    recording = read_recording(folder)
    known = replays_of(recording.system, packages)
    if not known:
        there = ", ".join(systems(packages))
        raise UnknownSystem(
            f"{folder}: system {recording.system!r} is not known; there are {there}; "
            "a package of others is named by --package"
        )
    selected = list(cases or ())
    unknown = [case for case in selected if case not in recording.cases]
    if unknown:
        there = ", ".join(sorted(recording.cases))
        raise UserError(f"{recording.folder} has no case {', '.join(unknown)}; there are {there}")
    recording.cases = set(selected) or recording.cases
    if not recording.output_cases:
        what = ", ".join(selected) or "the recording"
        raise UserError(f"{recording.folder}: {what} has no outputs, only inputs")
    report = Report(str(folder), recording.system)
    take_out(recording, report)
    outputs = replay_all(recording, known, report)
    for name in recording.names("output", recording.cases):
        ours = outputs.get(name)
        theirs = recording.tensors.get(name)
        reach = recording.reach.get(name, 0.0)
        report.comparisons.append(compare(name, recording.entries[name], ours, theirs, reach))
    report.leftovers += leftovers_of(recording, outputs, complete=not selected)
    return report


def take_out(recording: Recording, report: Report) -> None:
    """Leave the cases that are out of scope out of the recording's, and put them into the report."""
    for case, reason in OUT_OF_SCOPE.get(recording.system, {}).items():
        if case in recording.cases:
            count = len(recording.names("output", {case}))
            report.out_of_scope.append(LeftOut(case, count, reason))
            recording.cases = recording.cases - {case}


def replay_all(recording: Recording, known: Sequence[Replay], report: Report) -> dict[str, Tensor]:
    """Outputs of all replays that have a selected case; a replay that fails is a leftover, and the
    others still run.
    """
    outputs: dict[str, Tensor] = {}
    for replay in known:
        if not replay.covers_any(recording.output_cases):
            continue
        try:
            outputs.update(replay.function(recording))
        # whatever goes wrong in a replay is a finding about the recording, to be reported with the
        # rest
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            report.leftovers.append(f"replay of {', '.join(replay.cases)} failed: {kind}{error}")
    return outputs


def compare(
    name: str, entry: Entry, ours: Tensor | None, theirs: Tensor | None, reach: float = 0.0
) -> Comparison:
    """One output of ours against the recorded one; reports the value that is worst in terms of its
    tolerance. `reach`: how far roundings alone move ours.
    """
    problem = problem_of(entry, ours, theirs)
    if problem:
        return Comparison(name, entry.case, float("inf"), entry.atol, False, problem)
    assert ours is not None and theirs is not None
    ours64 = ours.detach().to(torch.float64)
    theirs64 = theirs.to(torch.float64)
    error = (
        torch.where(ours64 == theirs64, 0.0, (ours64 - theirs64).abs())
        .flatten()
        .nan_to_num(nan=torch.inf)
    )
    tolerance = (entry.atol + entry.rtol * theirs64.abs()).flatten().nan_to_num(nan=0.0, posinf=0.0)
    tolerance = tolerance + GROWN * reach
    if error.numel() == 0:
        return Comparison(name, entry.case, 0.0, entry.atol, True)
    outside = int((error > tolerance).sum())
    worst = int(torch.where(error == 0, 0.0, error / tolerance).argmax())
    note = f"{outside} of {error.numel()} values outside" if outside else ""
    if reach and not outside:
        note = f"roundings reach {reach:.1e}"
    return Comparison(
        name, entry.case, float(error[worst]), float(tolerance[worst]), not outside, note
    )


def problem_of(entry: Entry, ours: Tensor | None, theirs: Tensor | None) -> str:
    if theirs is None:
        return "not in io.safetensors"
    if tuple(theirs.shape) != entry.shape or dtype_name(theirs) != entry.dtype:
        recorded = f"{dtype_name(theirs)} {tuple(theirs.shape)}"
        return f"io.safetensors holds {recorded}, meta.json says {entry.dtype} {entry.shape}"
    if ours is None:
        return "no replay computes it"
    if ours.shape != theirs.shape:
        return f"ours has shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    return ""


def leftovers_of(recording: Recording, outputs: dict[str, Tensor], complete: bool) -> list[str]:
    """Lines about inputs and weight files that were not read, and tensors that only one side has."""
    inputs = set(recording.names("input", recording.cases))
    recorded = set(recording.names("output"))
    undescribed = set(recording.tensors) - set(recording.entries)
    odd = set()
    absent = set()
    for name, entry in recording.entries.items():
        if entry.role not in ("input", "output", "info"):
            odd.add(name)
        if entry.role != "output" and name not in recording.tensors:
            absent.add(name)
    unread = set(recording.weights) - recording.weights.used if complete else set()
    groups = {
        "input not used": inputs - recording.inputs.used - absent,
        "input missing from io.safetensors": absent,
        "tensor of unknown role": odd,
        "computed, but not recorded": set(outputs) - recorded,
        "in io.safetensors, but not in meta.json": undescribed,
        "weights not used": unread,
    }
    lines = []
    for what, names in groups.items():
        lines += [f"{what}: {name}" for name in sorted(names)]
    return lines

"""Tokenizers that understand beside those that do not, on Fashion-MNIST: TokenFlow, MingTok, SEED and RecTok, each
without what its paper adds, ViT-VQ and TiTok; a generator on each, at equal training samples.

    python -m benchmarks.studies.understanding --data DIR --extractor FILE --captioned DIR [--only NAME ...]

Trains every tokenizer and its generator by `train.py` (one thread, bfloat16), and measures reconstructions, usage and
prefixes by `evaluate.py tokens` on all test images, what features tell of classes by `evaluate.py probe`, and the
generator by `evaluate.py sweep`: guidance is chosen on other seeds than are reported. Distances are by the given
network and a second one. "retrieval" trains SEED's first stage and a ViT-VQ on Open Clip Art (`--captioned`), and asks
both for captions. Writes benchmarks/results/studies/understanding.json and three pictures, and prints tables. What is
there is not made again; what was interrupted goes on. `--updates N` and `--images N` are for a trial of the whole path:
with them results and pictures go to `--runs`.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.studies.steps import (
    EXPORTS,
    RESULTS,
    ROOT,
    Training,
    command,
    measured,
    read_results,
    write_results,
)
from benchmarks.studies.understanding_pictures import reconstructions, scales
from benchmarks.studies.understanding_retrieval import chance, own_retrieval, shards, similarities
from benchmarks.studies.understanding_retrieval import picture as retrieval_picture
from benchmarks.studies.understanding_tables import probe_table, retrieval_table, table
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.sampling.output import save_png

NAME = "understanding"
RETRIEVAL = "retrieval"
FASHION = ("--data", "tessellar.data.FashionMNISTData", "--data.root")
SECOND = EXPORTS / "fmnist-convnext-small.safetensors"
TEACHER = EXPORTS / "fmnist-vit.safetensors"
BATCH = 64
UPDATES = 500  # of a tokenizer, over all of its stages
GENERATOR_UPDATES = 400
CAPTIONED_UPDATES = 500
TOKENIZER = "--model.init_args.tokenizer.init_args"
SHORT = (
    *("--trainer.precision", "bf16-mixed", "--data.init_args.batch_size", str(BATCH)),
    *("--trainer.limit_val_batches", "4", "--trainer.check_val_every_n_epoch", "null"),
)


class Images(NamedTuple):
    """How many images are measured (None: all of the set)."""

    reconstructed: int | None = None
    prefixes: int = 1000
    probed: int = 6000  # training images that a probe is fitted to
    scored: int | None = 4000  # validation images that it is scored on
    tuning: int = 200  # samples at each guidance
    reported: int = 2000  # samples at the chosen one
    candidates: int | None = None  # validation images of Open Clip Art, and their captions


@dataclass(frozen=True)
class Stage:
    """A run of a tokenizer, its `share` of the updates, and what differs from its config: `options` of
    the tokenizer. `vision`: parts that read the weights of the network that stands in for a published one.
    """

    config: str
    share: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    vision: tuple[str, ...] = ()
    restarts: bool = False


@dataclass(frozen=True)
class System:
    """A tokenizer, stage by stage, each from the one before, and the config of its generator.

    `sampling` are words of the command line, `guidances` the scales that are tried, `features` what is
    probed beside latents, tokens and codes, averaged over positions.
    """

    name: str
    stages: tuple[Stage, ...]
    generator: str
    sampling: dict[str, Any] = field(default_factory=dict)
    guidances: tuple[float, ...] = (1.25, 2.0, 3.0)
    features: tuple[str, ...] = ()
    continuous: bool = False

    @property
    def run(self) -> str:
        """Its name in those of runs."""
        return self.name.lower().replace(",", "").replace(" ", "_")


# Every index is chosen by pixels alone, and nothing is known of the teacher.
PIXELS_ALONE = {
    "quantizer.init_args.pixel_weight": 10_000,
    "semantic.init_args.weights": None,
    "teacher": None,
}
UNTAUGHT = {"teacher": None, "semantic_dim": None}
SEED_STAGES = (
    Stage("seed_contrastive", 0.25, vision=("vision",)),
    Stage("seed_codebook", 0.25, vision=("vision", "teacher")),
    Stage("seed", 0.5, vision=("vision",)),
)
OF_SCALES = {"guidance": "Linear"}
OF_FLOW = {"guidance": "Constant", "flow": "Euler", "flow.steps": 16}
OF_SETS = {
    "algorithm.steps": 16,
    "guidance": "Revealed",
    "diffusion.steps": 25,
    "diffusion.clip": 4.0,
}
SYSTEMS = (
    System("ViT-VQ", (Stage("tokenizer", restarts=True),), "generator", features=("pixels",)),
    System("TiTok", (Stage("titok", restarts=True),), "generator"),
    System(
        "TokenFlow",
        (Stage("tokenflow", vision=("semantic", "teacher"), restarts=True),),
        "tokenflow_ar",
        sampling=OF_SCALES,
        features=("semantics",),
    ),
    System(
        "TokenFlow, pixels alone",
        (Stage("tokenflow", options=PIXELS_ALONE, restarts=True),),
        "tokenflow_ar",
        sampling=OF_SCALES,
    ),
    System(
        "MingTok",
        (Stage("mingtok", vision=("teacher", "detail_teacher")),),
        "mingtok_ar",
        sampling=OF_FLOW,
        features=("semantics",),
        continuous=True,
    ),
    System(
        "MingTok, untaught",
        (Stage("mingtok", options={**UNTAUGHT, "detail_teacher": None, "detail_dim": None}),),
        "mingtok_ar",
        sampling=OF_FLOW,
        features=("semantics",),
        continuous=True,
    ),
    # What its queries read, the stand-in itself, is probed too: what any of these could know.
    System("SEED", SEED_STAGES, "seed_ar", features=("semantics", "vision.network.norm")),
    System("SEED, without captions", SEED_STAGES[1:], "seed_ar", features=("semantics",)),
    System(
        "RecTok",
        (Stage("rectok", vision=("teacher",)),),
        "mar",
        sampling=OF_SETS,
        features=("semantics",),
        continuous=True,
    ),
    System(
        "RecTok, untaught",
        (Stage("rectok", options=UNTAUGHT),),
        "mar",
        sampling=OF_SETS,
        continuous=True,
    ),
)


def words_of(options: dict[str, Any], where: str) -> list[str]:
    """Options as they are typed, below `where`."""
    words = []
    for name, value in options.items():
        words += [f"{where}.{name}", json.dumps(value)]
    return words


def length_of(updates: int) -> tuple[str, ...]:
    """A run's length; it is validated at the end."""
    return ("--trainer.max_steps", str(updates), "--trainer.val_check_interval", str(updates))


def tokenizers(system: System, given: argparse.Namespace) -> list[Training]:
    """The runs of a tokenizer, a stage each."""
    made: list[Training] = []
    for stage in system.stages:
        updates = max(1, int(stage.share * given.updates))
        options = dict(stage.options)
        if stage.restarts:
            options["quantizer.init_args.restart_until"] = 7 * updates // 10
        words = [*SHORT, *length_of(updates), *words_of(options, TOKENIZER)]
        for part in stage.vision:
            words += [f"{TOKENIZER}.{part}.init_args.weights", str(TEACHER)]
        if made:
            words += ["--model.init_args.init_from", str(made[-1].folder(given.runs) / "export")]
        made.append(
            Training(
                f"{system.run}-{stage.config}",
                f"configs/fashion_mnist/{stage.config}.yaml",
                tuple(words),
                teacher=TEACHER.stem if stage.vision else "",
            )
        )
    return made


def generator(system: System, export: Path, updates: int) -> Training:
    """The run of a generator on the tokens of an export."""
    words = (*SHORT, *length_of(updates), "--model.init_args.tokenizer", str(export))
    file = f"configs/fashion_mnist/{system.generator}.yaml"
    return Training(f"{system.run}-generator", file, words)


def counted(option: str, count: int | None) -> tuple[str, ...]:
    """An option of a number of images; none for all."""
    return () if count is None else (option, str(count))


def tokens_of(export: Path) -> str:
    """How many tokens of what kind."""
    layout = load_tokenizer(export).layout
    return f"{layout.length} of {layout.segments[0].kind}"


def probes_of(system: System, export: Path, folder: Path, given: argparse.Namespace) -> Any:
    """Metrics by pooling: `flat` is all positions side by side, `mean` their mean. Codes are counted over
    all positions either way.
    """
    basic = ["latents", "tokens"]
    of_codes = [] if system.continuous else ["codes"]
    chosen = {"flat": basic, "mean": [*basic, *of_codes, *system.features]}
    found = {}
    for pooling, features in chosen.items():
        purity = ["purity"] if of_codes and pooling == "mean" else []
        record = measured(
            folder / f"probe-{pooling}.json",
            "evaluate.py",
            *("probe", str(export), *FASHION, str(given.data), "--batch_size", "250"),
            *("--features", *features, "--probes", "linear", "knn", *purity),
            *("--protocol.pooling", pooling, "--train_count", str(given.counts.probed)),
            *counted("--count", given.counts.scored),
        )
        found[pooling] = record["metrics"]
    return found


def swept(system: System, made: Training, given: argparse.Namespace) -> dict[str, Any]:
    """The guidance chosen, what was tried, and the distances on other seeds."""
    folder = made.folder(given.runs) / "sweep"
    if not (folder / "sweep.json").exists():
        words = []
        for name, value in system.sampling.items():
            words.append(f"--{name}={value}")
        command(
            "evaluate.py",
            *("sweep", str(made.folder(given.runs) / "export"), *words),
            *("--extractor", str(given.extractor), str(SECOND), "--metrics", "[fd,accuracy]"),
            *("--count", str(given.counts.tuning), "--final_count", str(given.counts.reported)),
            *("--axes", json.dumps({"guidance.scale": list(system.guidances)})),
            *(*FASHION, str(given.data), "--batch_size", "250"),
            *("--cache", str(given.runs / ".cache"), "--out", str(folder)),
        )
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def row_of(system: System, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one system."""
    stages = tokenizers(system, given)
    for stage in stages:
        export = stage.make(given.runs, given.data)
    drawn = generator(system, export, given.generator_updates)
    drawn.make(given.runs, given.data)
    folder = stages[-1].folder(given.runs)
    of_tokens = measured(
        folder / "tokens.json",
        "evaluate.py",
        *("tokens", str(export), "--extractor", str(given.extractor), str(SECOND)),
        *counted("--count", given.counts.reconstructed),
        *("--prefix_count", str(given.counts.prefixes), *FASHION, str(given.data)),
        *("--batch_size", "250", "--cache", str(given.runs / ".cache")),
    )
    sweep = swept(system, drawn, given)
    points = []
    for point in sweep["points"]:
        points.append({"guidance": point["values"]["guidance.scale"], **point["metrics"]})
    return {
        "name": system.name,
        "layout": tokens_of(export),
        "tokenizer": [stage.facts(given.runs) for stage in stages],
        "generator": drawn.facts(given.runs),
        "metrics": of_tokens["metrics"],
        "tokens": of_tokens["tokens"],
        "probes": probes_of(system, export, folder, given),
        "guidance": sweep["chosen"]["guidance.scale"],
        "tuning": points,
        "samples": sweep["final"]["metrics"],
    }


def captioned(given: argparse.Namespace) -> dict[str, Training]:
    """Runs on Open Clip Art by their names."""
    train, val = shards(given.captioned)
    where = ("--data.init_args.shards", train, "--data.init_args.val_shards", val)
    words = (*SHORT, *length_of(given.captioned_updates), *where)
    restarts = {"quantizer.init_args.restart_until": 7 * given.captioned_updates // 10}
    weights = (f"{TOKENIZER}.vision.init_args.weights", str(TEACHER))
    folder = "configs/openclipart64"
    return {
        "SEED": Training(
            "oca-seed",
            f"{folder}/seed_contrastive.yaml",
            (*words, *weights),
            teacher=TEACHER.stem,
        ),
        "ViT-VQ": Training(
            "oca-vit-vq",
            f"{folder}/tokenizer.yaml",
            (*words, *words_of(restarts, TOKENIZER)),
        ),
    }


def retrieval_row(given: argparse.Namespace) -> dict[str, Any]:
    """Captions of Open Clip Art by SEED's own features, and by a probe of both tokenizers."""
    runs = captioned(given)
    for run in runs.values():
        run.make(given.runs, None)
    features = {
        "SEED": ["qformer", "vision.network.norm"],
        "ViT-VQ": ["latents", "tokens", "codes"],
    }
    probes = {}
    train, val = shards(given.captioned)
    for name, run in runs.items():
        record = measured(
            run.folder(given.runs) / "probe.json",
            "evaluate.py",
            *("probe", str(run.folder(given.runs) / "export"), "--features", *features[name]),
            *("--data", "tessellar.data.WebDatasetData", "--data.size", "64"),
            *("--data.shards", train, "--data.val_shards", val),
            *("--probes", "retrieval", "--batch_size", "100"),
            *("--train_count", str(given.counts.probed)),
            *counted("--count", given.counts.candidates),
        )
        probes[name] = record["metrics"]
    export = runs["SEED"].folder(given.runs) / "export"
    found = similarities(export, given.captioned, given.counts.candidates)
    save_png(retrieval_picture(found), given.pictures / f"{NAME}_retrieval.png")
    return {
        "candidates": len(found.captions),
        "training": {name: run.facts(given.runs) for name, run in runs.items()},
        "chance": chance(found),
        "own": own_retrieval(found),
        "probes": probes,
    }


def exports_of(names: Sequence[str], given: argparse.Namespace) -> dict[str, Path]:
    """Exports of the tokenizers of systems that are there."""
    found = {}
    for system in SYSTEMS:
        export = tokenizers(system, given)[-1].folder(given.runs) / "export"
        if system.name in names and (export / "model.safetensors").exists():
            found[system.name] = export
    return found


def draw(rows: Sequence[dict[str, Any]], given: argparse.Namespace) -> None:
    """Pictures of what was measured, as far as its runs are there."""
    exports = exports_of([row["name"] for row in rows], given)
    if exports:
        save_png(reconstructions(exports, given.data), given.pictures / f"{NAME}.png")
    by_scale = {name: export for name, export in exports.items() if name.startswith("TokenFlow")}
    if by_scale:
        save_png(scales(by_scale, given.data), given.pictures / f"{NAME}_scales.png")


def write(rows: Sequence[dict[str, Any]], found: Any, given: argparse.Namespace) -> None:
    """Rows, retrieval where it was measured, and what they have in common."""
    write_results(
        NAME,
        rows,
        given.results,
        batch=BATCH,
        updates=given.updates,
        images=given.counts._asdict(),
        **{"generator updates": given.generator_updates, RETRIEVAL: found},
        **{"updates on Open Clip Art": given.captioned_updates},
    )


def measure(name: str, given: argparse.Namespace) -> None:
    """One row, or the retrieval; those of others stay, which another process may have written meanwhile."""
    chosen = {system.name: system for system in SYSTEMS}
    row = retrieval_row(given) if name == RETRIEVAL else row_of(chosen[name], given)
    known = read_results(NAME, given.results)
    found = row if name == RETRIEVAL else known.get(RETRIEVAL)
    rows = {one["name"]: one for one in known["rows"]}
    if name != RETRIEVAL:
        rows[name] = row
    write([rows[one] for one in chosen if one in rows], found, given)


def show(given: argparse.Namespace) -> None:
    """Tables and pictures of what was measured."""
    known = read_results(NAME, given.results)
    if known["rows"]:
        draw(known["rows"], given)
        print(table(known["rows"]), probe_table(known["rows"]), sep="\n\n", flush=True)
    if known.get(RETRIEVAL):
        print(f"\n{retrieval_table(known[RETRIEVAL])}", flush=True)


def settle(given: argparse.Namespace) -> None:
    """Paths that hold from the repository's folder, sizes, and where results go."""
    for name in ("data", "extractor", "captioned", "runs"):
        setattr(given, name, getattr(given, name).resolve())
    trial = given.updates is not None or given.images is not None
    given.results = given.runs if trial else RESULTS
    given.pictures = given.runs if trial else ROOT / "docs" / "pictures"
    given.generator_updates = given.updates or GENERATOR_UPDATES
    given.captioned_updates = given.updates or CAPTIONED_UPDATES
    given.updates = given.updates or UPDATES
    given.counts = (
        Images() if given.images is None else Images(*[given.images] * len(Images._fields))
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Rows of all systems and the retrieval, or of those named by `--only`."""
    names = [*[system.name for system in SYSTEMS], RETRIEVAL]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--extractor", type=Path, required=True, help="feature network's file")
    parser.add_argument("--captioned", type=Path, required=True, help="folder of Open Clip Art")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/understanding"))
    parser.add_argument("--only", nargs="*", choices=names, help="none: only tables and pictures")
    parser.add_argument("--updates", type=int, help="of every run, for a trial")
    parser.add_argument("--images", type=int, help="of every measurement, for a trial")
    given = parser.parse_args(argv)
    settle(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    for name in names:
        if given.only is None or name in given.only:
            measure(name, given)
            show(given)
    if given.only == []:
        show(given)


if __name__ == "__main__":
    main()

"""`evaluate.py sweep`: which guidance, temperature, ... a generator is best at, and its numbers there
on other seeds.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from tessellar import distributed
from tessellar.checkpoints.reading import Source, read_source
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli.axes import combinations, spelled_values
from tessellar.cli.evaluation_run import CACHE, Measurement, check_count, data_of_run, warn
from tessellar.cli.functions import run_functions, take_list
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.evaluation import protocols
from tessellar.evaluation.engine import Yardstick, evaluate
from tessellar.evaluation.generation import GeneratedImages
from tessellar.evaluation.protocols import Metric, Protocol
from tessellar.evaluation.record import Record, summary, write_record
from tessellar.evaluation.sweep import (
    Point,
    best_of,
    draw,
    kept_record,
    table,
    write_summary,
)
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator, assemble
from tessellar.processes.diffusion import AncestralDiffusion, DiffusionSampler
from tessellar.processes.flow import EulerMaruyama, Flow
from tessellar.protocol.choice import Choice
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.packages import trust
from tessellar.protocol.ranges import check_number
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.run import check_seed
from tessellar.sampling.settings import Sampling

log = logging.getLogger(__name__)
SETTINGS = tuple(part.name for part in fields(Sampling))
EMA = "ema"


def sweep(
    model: str,
    data: ImageDataModule | None = None,
    reference: list[str] | None = None,
    extractor: list[str] | None = None,
    network: NetworkFacts | None = None,
    metrics: list[Metric] | None = None,
    count: int = 5000,
    final_count: int | None = None,
    protocol: str = "free",
    choose: str = "",
    guidance: GuidanceSchedule = Constant(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    algorithm: Algorithm = Ancestral(),  # noqa: B008
    flow: Flow = EulerMaruyama(),  # noqa: B008
    diffusion: DiffusionSampler = AncestralDiffusion(),  # noqa: B008
    axes: dict[str, list[Any]] = {},  # noqa: B006
    labels: Literal["balanced", "random"] = "balanced",
    seed: int = 0,
    precision: Literal["float32", "bf16"] = "float32",
    raw: bool = False,
    package: str = "",
    out: str = "outputs/sweep",
    batch_size: int = 64,
    device: str = "auto",
    cache: str = CACHE,
) -> None:
    """Measure a generator at several sampling settings, choose the best, and measure that on other
    seeds.

    An option of sampling may have several values: --guidance.scale 1 1.5 2 --choice.temperature 0.9
    1 tries all six combinations. An interrupted sweep goes on where it was.

    Args:
        model: export folder, .safetensors, .ckpt or hub id
        data: data set, as in a training YAML (default: that of the run)
        reference: train or val of --data, or a path (default: train)
        extractor: inception (downloaded), its weights file, or timm networks; one pass for all
        network: what the .safetensors holds, where it does not say so itself
        metrics: what each point is measured by (default: fd, and is where a network has classes)
        count: samples at each point, always of the seeds --seed + 0 ... --count - 1
        final_count: samples at the chosen point, of the seeds behind those (default: the protocol's, or --count)
        protocol: of the last measurement: adm-50k, torch-fidelity, clean-fid, llamagen, fdr6, fmnist-10k or free
        choose: the metric to choose by (default: the first distance)
        guidance: classifier-free guidance, a schedule over the entities (Constant); its fields may have several values
        choice: how a token is drawn from its probabilities; its fields may have several values
        algorithm: decoding algorithm; its fields may have several values
        flow: how tokens of a flow-matching generator are drawn
        diffusion: how tokens of a generator with a diffusion head are drawn
        axes: the same as several values behind an option: '{"guidance.scale": [1, 1.5]}'; ema: decays kept in a .ckpt
        labels: classes of the samples: equally often (balanced), or drawn uniformly (random, LlamaGen's)
        seed: sample i is drawn with seed + i
        precision: arithmetic of the generator
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        out: folder to write: sweep.json, sweep.png, final.json, points/
        batch_size: images at once
        device: auto, cpu, cuda, ...
        cache: folder of computed references
    """
    trust(package)
    check_count("--count", count)
    check_count("--final-count", final_count)
    checked = protocols.protocol(protocol)
    reported = final_count or checked.samples or count
    check_seed(seed, count + reported)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    base = Sampling(guidance, choice, algorithm, flow, diffusion)
    settings = swept_points(axes)
    plans = [(values, varied(base, values)) for values in settings]
    measurement = Measurement(checked, extractor or [], network, device, cache, batch_size)
    if distributed.rank() == 0:
        points = f"{len(plans)} points x {count} images"
        log.info("sweeps %s: %s, then %s; writes %s", model, points, reported, out)
    loaded = Models(model, raw, measurement)
    data = data or data_of_run(model)
    references = measurement.references(reference or ["train"], data)
    yardsticks = measurement.yardsticks(references)
    classes = any(one.extractor.num_classes for one in yardsticks)
    measured: list[Metric] = metrics or (["fd", "is"] if classes else ["fd"])
    compared = [one.reference.hash if one.reference else None for one in yardsticks]

    def record_of(
        values: dict[str, Any], sampling: Sampling, images: int, first: int, how: Protocol
    ) -> Record:
        generator, facts = loaded.with_average(values.get(EMA))
        # What a number depends on: kept under it.
        key = {
            "fingerprint": facts["fingerprint"],
            "sampling": sampling.describe(),
            "images": images,
            "seed": first,
            "precision": precision,
            "labels": labels,
            "networks": [one.extractor.describe() for one in yardsticks],
            "references": compared,
            "metrics": measured,
            "protocol": how.describe(),
        }

        def measure() -> Record:
            names = generator.class_names or (data.class_names if data else ())
            source = GeneratedImages(
                generator,
                images,
                sampling=sampling,
                seed=first,
                data=data.val_dataset() if data else None,
                precision=precision,
                facts=facts,
                class_names=names,
                random_classes=labels == "random",
            )
            return evaluate(
                source, yardsticks, protocol=how, metrics=measured, batch_size=batch_size
            )

        return kept_record(folder / "points", key, measure)

    free = protocols.protocol("free")
    found = []
    for values, sampling in plans:
        record = record_of(values, sampling, count, seed, free)
        found.append(Point(values, record))
        if distributed.rank() == 0:
            log.info("%s: %s", spelled_values(values), summary(record))
    shown = [name for name in found[0].record["metrics"] if not name.endswith(" std")]
    chosen = best_of(found, choose or shown[0])
    sampling = varied(base, chosen.values)
    # Behind the seeds that chose: no sample is measured twice.
    final = record_of(chosen.values, sampling, reported, seed + count, checked)
    if distributed.rank() == 0:
        report(folder, found, chosen, final, shown, yardsticks, seeds=(seed, count, reported))


def report(
    folder: Path,
    points: Sequence[Point],
    chosen: Point,
    final: Record,
    shown: Sequence[str],
    yardsticks: Sequence[Yardstick],
    seeds: tuple[int, int, int],
) -> None:
    """Write the table, the picture and the last record, and print what to report."""
    seed, count, reported = seeds
    ranges = {
        "tuning_seeds": [seed, seed + count - 1],
        "reporting_seeds": [seed + count, seed + count + reported - 1],
        "networks": [one.extractor.name for one in yardsticks],
    }
    write_record(final, folder / "final.json")
    write_summary(folder / "sweep.json", points, chosen, final, ranges)
    print(table(points, chosen, shown))
    if points[0].values:
        draw(points, chosen, shown, folder / "sweep.png")
    warn(final["warnings"])
    print(f"chosen: {spelled_values(chosen.values)}")
    print(
        f"on other seeds: {summary(final)}\nfingerprint {final['fingerprint']}, written: {folder}"
    )


class Models:
    """The generator, built once; of a training checkpoint with several averages, each in turn."""

    def __init__(self, path: str, raw: bool, measurement: Measurement) -> None:
        self.path = path
        self.source: Source = read_source(path, raw=raw)
        built = assemble(self.source)
        if not isinstance(built, ImageGenerator):
            raise UserError(f"{path} is a tokenizer; settings of sampling are of a generator")
        self.generator = built.to(measurement.on)
        self.decay: float | None = None
        self.fingerprint = fingerprint(self.generator)

    def with_average(self, decay: float | None) -> tuple[ImageGenerator, dict[str, Any]]:
        """The generator with the average of that decay (None: as it was read), and what records say
        of it.
        """
        if decay != self.decay:
            self.source = read_source(self.path, ema=decay)
            averaged = assemble(self.source)
            self.generator.load_state_dict(averaged.state_dict())
            self.decay = decay
            self.fingerprint = fingerprint(self.generator)
        facts = {
            "model": self.path,
            "weights": self.source.weights,
            "fingerprint": self.fingerprint,
        }
        return self.generator, facts


def swept_points(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of the swept values; raises UserError for what cannot be swept."""
    for name in axes:
        known = (*SETTINGS, EMA)
        if name.split(".")[0] not in known:
            raise UserError(f"{name!r} cannot be swept; there are the fields of {', '.join(known)}")
    rows = combinations(axes)
    for value in axes.get(EMA, ()):
        check_number("--ema", value, least=0, most=1)
    return rows


def varied(base: Sampling, values: Mapping[str, Any]) -> Sampling:
    """`base` with some fields changed (`guidance.scale`), or with another class (`guidance`); raises
    UserError, as the command line does, for fields and values that do not exist.
    """
    described = base.describe()
    # A class first: it has its own fields.
    for name, value in sorted(values.items(), key=lambda item: item[0].count(".")):
        part, *rest = name.split(".")
        if part == EMA:
            continue
        place = described
        if not rest:
            kept = {"scale": base.guidance.scale} if part == "guidance" else {}
            described[part] = {"class_path": value, "init_args": kept}
            continue
        place = described[part].get("init_args", described[part])
        for inner in rest[:-1]:
            place = place.setdefault(inner, {})
        place[rest[-1]] = value
    words = [f"--{name}={json.dumps(value)}" for name, value in described.items()]
    try:
        return run_functions(_settings, words)
    except UserError as error:
        raise UserError(f"{spelled_values(values)}: {error}") from error


def _settings(
    guidance: GuidanceSchedule = Constant(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    algorithm: Algorithm = Ancestral(),  # noqa: B008
    flow: Flow = EulerMaruyama(),  # noqa: B008
    diffusion: DiffusionSampler = AncestralDiffusion(),  # noqa: B008
) -> Sampling:
    return Sampling(guidance, choice, algorithm, flow, diffusion)


def with_axes(argv: Sequence[str]) -> list[str]:
    """Words of a sweep: options of sampling with several values become `--axes`, and keep their
    first.
    """
    words = list(argv)
    axes: dict[str, list[Any]] = {}
    plain = [words.pop(0)]
    named = False
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.split(".")[0] not in (*SETTINGS, EMA):
            named = named or (not word.startswith("-") and not plain[-1].startswith("--"))
            plain.append(word)
            continue
        given = [value] if equals else take_list(words, 0 if named else 1, {})
        if name == EMA or len(given) > 1:
            axes[name] = [_value(text) for text in given]
        if name != EMA and given:
            plain.append(f"--{name}={given[0]}")
    return [*plain, f"--axes={json.dumps(axes)}"] if axes else plain


def _value(text: str) -> Any:
    """A number, or a word as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text

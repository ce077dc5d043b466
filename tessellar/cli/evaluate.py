"""`evaluate.py`: measure samples, models and tokenizers; make references and feature networks;
compare records.

A set of images is named by the path of a folder or an npz, or by `train` or `val`, which are those
of --data.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tessellar import distributed
from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli.evaluation_run import (
    CACHE,
    Measurement,
    check_count,
    check_out,
    data_of_run,
    split_of,
)
from tessellar.cli.evaluation_sweep import sweep, with_axes
from tessellar.cli.evaluation_tools import compare, extractor, neighbours, stats
from tessellar.cli.functions import Elsewhere, run_functions
from tessellar.cli.older_sampling import refuse_older
from tessellar.cli.sample import size_of
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.evaluation import protocols
from tessellar.evaluation.class_match import match_classes
from tessellar.evaluation.generation import GeneratedImages, KeptImages, Reconstructions
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.protocols import Metric
from tessellar.evaluation.sources import ImageSource, open_images
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator, assemble
from tessellar.processes.diffusion import AncestralDiffusion, DiffusionSampler
from tessellar.processes.flow import EulerMaruyama, Flow
from tessellar.protocol.choice import Choice
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.packages import trust
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.kept import shard_of
from tessellar.sampling.run import check_seed
from tessellar.sampling.settings import Sampling


def samples(
    samples: str,
    reference: list[str] | None = None,
    data: ImageDataModule | None = None,
    size: int | None = None,
    extractor: list[str] | None = None,
    network: NetworkFacts | None = None,
    validation: list[str] | None = None,
    protocol: str = "free",
    metrics: list[Metric] | None = None,
    count: int | None = None,
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
    cache: str = CACHE,
) -> None:
    """Measure a folder of PNG files, or an npz with arr_0.

    Args:
        samples: folder or npz
        reference: folder, npz of images or of statistics (then one for each network); or train or val of --data
        data: data set of the reference, as in a training YAML: a class, then --data.root and so on
        size: crop the centre of the images of both folders to this size, as ADM does
        extractor: inception (downloaded), its weights file, a timm network's .safetensors; or several, for one pass
            (fdr6: the six of FDr^6; NAME or NAME=FILE: a network of the field, such as dinov2)
        network: what the .safetensors holds, where it does not say so itself
        validation: folder or npz of validation images, or val of --data: the ratio fdr divides by their distance
        protocol: adm-50k, torch-fidelity, clean-fid, llamagen, fdr6, rfid-val, fmnist-10k or free
        metrics: of fd fdinf fdr sfd is kid mind cmmd pr dc accuracy (default: the protocol's)
        count: how many images there should be; another number is refused
        out: JSON record to write (default: a new file below outputs/evaluations)
        batch_size: images at once; it does not change the numbers
        device: auto, cpu, cuda, ...
        cache: folder of computed references
    """
    check_out(out)
    source = open_images(samples, size=size)
    if count is not None and source.count != count:
        raise UserError(f"{samples} holds {source.count} images, not the {count} of --count")
    measurement = Measurement(
        protocols.protocol(protocol), extractor or [], network, device, cache, batch_size
    )
    measurement.begin(samples, out)
    references = measurement.references(reference, data, size)
    measurement.validation = measurement.references(validation, data, size)
    measurement.report(source, references, metrics, out)


def model(
    model: str,
    data: ImageDataModule | None = None,
    reference: list[str] | None = None,
    extractor: list[str] | None = None,
    network: NetworkFacts | None = None,
    validation: list[str] | None = None,
    protocol: str = "free",
    metrics: list[Metric] | None = None,
    count: int | None = None,
    labels: Literal["balanced", "random", "data"] = "balanced",
    guidance: GuidanceSchedule = Constant(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    algorithm: Algorithm = Ancestral(),  # noqa: B008
    flow: Flow = EulerMaruyama(),  # noqa: B008
    diffusion: DiffusionSampler = AncestralDiffusion(),  # noqa: B008
    seed: int = 0,
    precision: Literal["float32", "bf16"] = "float32",
    raw: bool = False,
    package: str = "",
    lpips_weights: str | None = None,
    keep: str = "",
    shard: str | None = None,
    size: list[int] | None = None,
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
    cache: str = CACHE,
) -> None:
    """Measure a generator by class-balanced samples, or a tokenizer by its reconstructions, without
    files between.

    Args:
        model: export folder, .safetensors, .ckpt or hub id
        data: data set, as in a training YAML (default: that of the run)
        reference: train or val of --data, or a path (default: train, val of reconstructions)
        extractor: networks for one pass: inception, files, NAME[=FILE] as dinov2, fdr6, none
        network: what the .safetensors holds, where it does not say so itself
        validation: val of --data, or a path: what the ratio fdr divides by
        protocol: adm-50k, torch-fidelity, clean-fid, llamagen, fdr6, rfid-val, fmnist-10k, free
        metrics: of fd fdinf fdr sfd is kid mind cmmd pr dc accuracy paired lpips
        count: samples, or validation images to reconstruct (default: the protocol's, or all)
        labels: classes equally often (balanced), drawn (random), or as the data has them (data)
        guidance: classifier-free guidance, a schedule over the entities (Constant); scale 1 is none
        choice: how a token is drawn from its probabilities
        algorithm: decoding algorithm, such as SpeculativeJacobi; --algorithm.help lists them with their options
        flow: how tokens of a flow-matching generator are drawn: a solver and its steps
        diffusion: how tokens of a generator with a diffusion head are drawn
        seed: sample i is drawn with seed + i
        precision: arithmetic of the generator
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        lpips_weights: torchvision's VGG-16 weights (default: downloaded)
        keep: folder in which samples stay, so that an interrupted evaluation goes on
        shard: make only the part 1/4, 2/4, ... of the samples, into --keep
        size: height and width, of a model that was trained on several, and of the data (default: its own)
        out: JSON record to write (default: a new file below outputs/evaluations)
        batch_size: images at once
        device: auto, cpu, cuda, ...
        cache: folder of computed references
    """
    trust(package)
    check_out(out)
    check_count("--count", count)
    check_seed(seed, count or 1)
    part = shard_of(shard)
    if shard is not None and not keep:
        raise UserError("--shard makes a part of the samples: say where they gather, --keep FOLDER")
    measurement = Measurement(
        protocols.protocol(protocol), extractor or [], network, device, cache, batch_size
    )
    measurement.begin(model, out)
    data = data or data_of_run(model)
    made = read_source(model, raw=raw)
    loaded = assemble(made).to(measurement.on)
    facts = {"model": model, "weights": made.weights, "fingerprint": fingerprint(loaded)}
    shown = size_of(size)
    if shown is not None:
        loaded.take_size(shown)
        facts["size"] = f"{shown[0]} x {shown[1]}"
        if data is not None:
            data.take_size(shown)
    count = count or measurement.protocol.samples
    if isinstance(loaded, Tokenizer):
        if keep:
            raise UserError("--keep is of samples; reconstructions are made again")
        source: ImageSource = Reconstructions(loaded, split_of("val", data, count), facts)
        measures: list[Metric] = ["fd", "paired"] if measurement.sees else ["paired"]
        if reference:
            against = measurement.references(reference, data)
        else:  # the very images that were reconstructed
            against = None
            if measurement.sees:
                against = measurement.references_of(split_of("val", data, count))
        metrics = metrics or (measures if protocol == "free" else None)
    else:
        sampling = Sampling(guidance, choice, algorithm, flow, diffusion)
        generated = _generated(
            loaded,
            count,
            sampling=sampling,
            seed=seed,
            precision=precision,
            data=data,
            facts=facts,
            plan=labels,
        )
        source = KeptImages(generated, Path(keep)) if keep else generated
        if shard is not None and isinstance(source, KeptImages):
            missing = source.make(batch_size, part)
            if distributed.rank() == 0:
                print(f"{source.count - missing} of {source.count} samples are in {keep}")
            return
        against = measurement.references(reference or ["train"], data)
        if protocol == "free" and not metrics:
            metrics = _free_metrics(generated, measurement.extractors)
    measurement.validation = measurement.references(validation, data)
    measurement.report(source, against, metrics, out, lpips_weights)


def _generated(
    model: ImageGenerator,
    count: int | None,
    sampling: Sampling,
    seed: int,
    precision: str,
    data: ImageDataModule | None,
    facts: dict[str, Any],
    plan: str,
) -> GeneratedImages:
    if not count:
        raise UserError("say how many samples: --count N, or a --protocol that fixes it")
    captions = data.val_dataset() if data else None
    names = model.class_names or (data.class_names if data else ())
    return GeneratedImages(
        model,
        count,
        sampling=sampling,
        seed=seed,
        data=captions,
        precision=precision,
        facts=facts,
        class_names=names,
        class_counts=_counts(model, data) if plan == "data" else (),
        random_classes=plan == "random",
    )


def _counts(model: ImageGenerator, data: ImageDataModule | None) -> list[int]:
    """How many training images of `data` each class of the model has, found by name."""
    if data is None:
        raise UserError("--labels data needs a data set: name it with --data")
    if model.num_classes is None:
        raise UserError("--labels data is for generators of classes; this one follows captions")
    counts = data.train_dataset(augment=False).labels.bincount(minlength=data.num_classes).tolist()
    names = model.class_names or data.class_names
    if set(names) != set(data.class_names) or len(names) != model.num_classes:
        raise UserError(f"--labels data: {data.name} has other classes than the model")
    return [counts[data.class_names.index(name)] for name in names]


def _free_metrics(source: GeneratedImages, extractors: Sequence[Extractor]) -> list[Metric]:
    """The distance, and class accuracy where the networks that have classes know the generator's."""
    classifiers = [extractor for extractor in extractors if extractor.num_classes]
    known = [extractor for extractor in classifiers if _knows(extractor, source)]
    return ["fd", "accuracy"] if known and known == classifiers else ["fd"]


def _knows(extractor: Extractor, source: GeneratedImages) -> bool:
    classes = getattr(source.model.conditioner, "num_classes", None)
    bare = not source.class_names or not extractor.class_names
    if classes is None or (bare and classes != extractor.num_classes):
        return False
    try:
        match_classes(source, extractor)
    except UserError:
        return False
    return True


COMMANDS = {
    "samples": samples,
    "model": model,
    "stats": stats,
    "tokens": Elsewhere("tessellar.cli.evaluation_tokens", "tokens"),
    "probe": Elsewhere("tessellar.cli.evaluation_tokens", "probe"),
    "extractor": extractor,
    "neighbours": neighbours,
    "compare": compare,
    "sweep": sweep,
    "t2i": Elsewhere("tessellar.cli.text_to_image", "t2i"),
    "clipscore": Elsewhere("tessellar.cli.text_to_image", "clipscore"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `evaluate.py` and `tessellar evaluate`."""
    with distributed.session():
        words = list(sys.argv[1:] if argv is None else argv)
        refuse_older(words)
        if words[:1] == ["sweep"]:
            words = with_axes(words)
        return run_functions(COMMANDS, words, "evaluate")

"""`evaluate.py stats|extractor|neighbours|compare`: what is needed around a measurement."""

import logging
from pathlib import Path

from tessellar import distributed
from tessellar.cli.evaluation_run import (
    SPLITS,
    Measurement,
    check_count,
    check_out,
    split_of,
    warn,
)
from tessellar.cli.sample import pick_device
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.evaluation import protocols
from tessellar.evaluation.generation import Reconstructions
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.train_extractor import Architecture, Recipe, train_extractor
from tessellar.evaluation.pictures import nearest as nearest_images
from tessellar.evaluation.pictures import neighbour_grid, pick_images, pixels
from tessellar.evaluation.record import compare as comparison
from tessellar.evaluation.record import differences, read_record
from tessellar.evaluation.references import references_from, save_statistics
from tessellar.evaluation.sources import ImageSource, open_images
from tessellar.networks.facts import MAX_SIDE, PURPOSE, NetworkFacts, Purpose
from tessellar.pipeline import ImageGenerator, load
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.output import save_png

log = logging.getLogger(__name__)


def stats(
    images: str,
    data: ImageDataModule | None = None,
    size: int | None = None,
    extractor: list[str] | None = None,
    network: NetworkFacts | None = None,
    protocol: str = "free",
    through: str = "",
    count: int | None = None,
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Reference statistics of any images: mu, sigma (and mu_s, sigma_s for sFID, features for KID,
    precision, recall).

    Args:
        images: folder or npz with arr_0; or train or val of --data
        data: data set, as in a training YAML: a class, then --data.root and so on
        size: crop the centre of a folder's images to this size, as ADM does
        extractor: inception (downloaded), its weights file, a timm network's .safetensors; or several, for one pass
            over the images and a file OUT-NAME.npz for each
        network: what the .safetensors holds, where it does not say so itself
        protocol: whose resize the Inception network takes
        through: a tokenizer, or a generator that holds one: of the images as it reconstructs them, from which a perfect
            generator of its tokens would have distance 0
        count: of so many images of --data, a fixed random part
        out: npz to write
        batch_size: images at once; it does not change the numbers
        device: auto, cpu, cuda, ...
    """
    if not out:
        raise UserError("say where to write: --out REF.npz")
    check_out(out)
    check_count("--count", count)
    if size is not None:
        check_whole("--size", size, least=1, most=MAX_SIDE)
    measurement = Measurement(
        protocols.protocol(protocol), extractor or [], network, device, None, batch_size
    )
    if distributed.rank() == 0:
        names = ", ".join(each.name for each in measurement.extractors)
        log.info("statistics of %s by %s; writes %s", images, names, out)
    source: ImageSource
    if images in SPLITS:
        source = split_of(images, data, count)
    else:
        source = open_images(images, as_samples=False, size=size)
    if through:
        model = load(through).to(measurement.on)
        source = Reconstructions(
            model.tokenizer if isinstance(model, ImageGenerator) else model, source
        )
    references = references_from(source, measurement.extractors, None, batch_size)
    if distributed.rank() > 0:
        return
    for reference, each in zip(references, measurement.extractors, strict=True):
        path = Path(out)
        if len(references) > 1:
            path = path.with_name(f"{path.stem}-{each.name}{path.suffix}")
        save_statistics(reference, path)
        what = f"{reference.moments.count} images of {reference.name}, hash {reference.hash}"
        print(f"wrote {path}: {what}")
    warn(references[0].warnings)


def extractor(
    out: str = "",
    data: ImageDataModule | None = None,
    architecture: Architecture = Architecture(),  # noqa: B008
    recipe: Recipe = Recipe(),  # noqa: B008
    purpose: Purpose = PURPOSE,
    device: str = "auto",
) -> None:
    """Train a feature network on a labelled data set; distances measured with it are written
    FD(name).

    Args:
        out: .safetensors file to write
        data: data set, as in a training YAML: a class, then --data.root and so on
        architecture: a timm network, and the name that distances carry
        recipe: epochs, learning rate, augmentation, seed
        purpose: evaluator, or teacher of a tokenizer: a file serves one of them
        device: auto, cpu, cuda, ...
    """
    if data is None or not out.endswith(".safetensors"):
        raise UserError(
            "say what to train on and where to write: --data CLASS ... --out NET.safetensors"
        )
    check_out(out)
    log.info("data: %s: %s; writes %s", data.name, data.found(), out)
    facts = train_extractor(data, out, architecture, recipe, pick_device(device), purpose)
    print(f"wrote {out}: {facts.name}, validation accuracy {facts.training['val_accuracy']:.4f}")


def neighbours(
    samples: str,
    data: ImageDataModule | None = None,
    size: int | None = None,
    extractor: str = "",
    network: NetworkFacts | None = None,
    count: int = 10,
    nearest: int = 7,
    out: str = "outputs/neighbours.png",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Draw some of the samples, each beside its nearest training images: does the model memorise?

    Args:
        samples: folder or npz
        data: data set whose training images are searched: a class, then --data.root and so on
        size: crop the centre of a folder's images to this size
        extractor: compare features of this network (default: pixels)
        network: what the .safetensors holds, where it does not say so itself
        count: number of samples
        nearest: number of training images beside each
        out: PNG to write
        batch_size: images at once
        device: auto, cpu, cuda, ...
    """
    check_out(out)
    check_count("--count", count)
    check_count("--nearest", nearest)
    check_count("--batch_size", batch_size)
    source = open_images(samples, size=size)
    train = split_of("train", data)
    if distributed.rank() == 0:
        log.info("looks for %s among the images of %s; writes %s", samples, train.name, out)
    net = load_extractor(extractor, network).to(pick_device(device)) if extractor else None
    picked = pick_images(source, count)
    found = nearest_images(
        picked, train, nearest, (lambda x: net(x).features) if net else pixels, batch_size
    )
    if distributed.rank() == 0:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        save_png(neighbour_grid(picked, found), Path(out))
        copies = int((found.distances[:, 0] == 0).sum())
        print(f"wrote {out}: {len(picked)} samples, {copies} of them equal to a training image")


def compare(a: str, b: str) -> int:
    """Put two records side by side; exit code 1 where their numbers are not comparable.

    Args:
        a: JSON record
        b: JSON record
    """
    records = read_record(a), read_record(b)
    print(comparison(*records, names=(Path(a).stem[:12], Path(b).stem[:12])))
    return 1 if differences(*records) else 0

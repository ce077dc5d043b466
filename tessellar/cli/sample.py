"""`sample.py`: images of classes or prompts from a trained generator, in a folder that says how
they were made.
"""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tessellar import distributed
from tessellar.checkpoints.reading import Source, read_source
from tessellar.checkpoints.staging import check_target, staged_folder
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli.functions import run_functions
from tessellar.cli.older_sampling import refuse_older
from tessellar.data.captions import decode_text
from tessellar.data.pixels import read_mask, read_pixels
from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator, assemble, pick_device
from tessellar.plain_data import read_json
from tessellar.processes.diffusion import AncestralDiffusion, DiffusionSampler
from tessellar.processes.flow import EulerMaruyama, Flow
from tessellar.progress import Progress, count_of
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.packages import trust
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.editing.edits import Edit, Inpaint
from tessellar.sampling.editing.run import Editing
from tessellar.sampling.kept import KeptSet, own_part, shard_of
from tessellar.sampling.output import SampleFolder, file_name
from tessellar.sampling.report import Recorder
from tessellar.sampling.run import (
    MAX_IMAGES,
    Batches,
    Drawing,
    balanced_labels,
    check_seed,
)
from tessellar.sampling.search.run import Searching
from tessellar.sampling.search.searching import Search
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner

log = logging.getLogger(__name__)
RECORD = "samples.json"
DEFAULT_COUNT = 100


def sample(
    model: str,
    out: str = "outputs/samples",
    classes: str = "all",
    prompts: str | None = None,
    count: int | None = None,
    per_class: int | None = None,
    guidance: GuidanceSchedule = Constant(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    algorithm: Algorithm = Ancestral(),  # noqa: B008
    flow: Flow = EulerMaruyama(),  # noqa: B008
    diffusion: DiffusionSampler = AncestralDiffusion(),  # noqa: B008
    seed: int = 0,
    batch_size: int = 64,
    precision: Literal["float32", "bf16"] = "float32",
    device: str = "auto",
    raw: bool = False,
    package: str = "",
    png: bool = True,
    npz: bool = False,
    grid: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    shard: str | None = None,
    search: Search | None = None,
    image: str | None = None,
    mask: str | None = None,
    edit: Edit | None = None,
    other: str | None = None,
    size: list[int] | None = None,
) -> None:
    """Make images of classes, or of prompts: image i has class classes[i % len(classes)] and its
    own seed, seed + i.

    Args:
        model: export folder, .safetensors, training checkpoint (.ckpt) or hub id
        out: folder to write; it appears when all images are made
        classes: names or ids of classes such as bag,3,5-9, or all
        prompts: text file with a prompt a line, for generators that read text, instead of classes
        count: number of images (default 100, or one a prompt)
        per_class: number of images of each class or prompt, instead of count
        guidance: classifier-free guidance over the entities; scale 1 is none
        choice: how a token is drawn from its probabilities
        algorithm: decoding algorithm, such as SpeculativeJacobi; --algorithm.help lists them
        flow: solver of a flow-matching generator and its steps
        diffusion: how tokens of a generator with a diffusion head are drawn
        seed: seed of the first image; sets of N images differ where seeds lie N apart
        batch_size: images at once; tokens do not depend on it, pixels by one level at most
        precision: arithmetic of the generator
        device: auto, cpu, cuda, cuda:1, ...
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        png: write a PNG an image
        npz: write samples.npz, which ADM's evaluator reads
        grid: write grid.png, a row a class
        overwrite: replace an older set of samples
        resume: keep unfinished work beside --out, so that the same command goes on; a finished set stays
        shard: make part 1/4, 2/4, ... of the set; the folder appears with the last part
        search: keep the best of several candidates, such as Beam; --search.help lists them
        image: picture to edit, or that a search compares with (Reconstruction)
        mask: picture of the size of --image, light where that is drawn anew
        edit: how to edit, such as Inpaint or Continue; --edit.help lists them
        other: second picture of an edit (Swap)
        size: height and width, of a model that was trained on several (default: its own)
    """
    trust(package)
    keeps = resume or shard is not None
    # A job that goes on may find its set finished: which set that is, is known further down.
    finished = keeps and not overwrite and (Path(out) / RECORD).is_file()
    if not finished:
        check_target(Path(out), RECORD, overwrite)
    source, generator = _load(model, raw, device)
    shown = size_of(size)
    if shown is not None:
        generator.take_size(shown)
    texts = None if prompts is None else read_prompts(prompts, generator)
    named = parse_classes(classes, generator) if texts is None else list(range(len(texts)))
    edits = edit is not None or mask is not None
    default = DEFAULT_COUNT if texts is None and not edits else len(named)
    if count is not None and per_class is not None:
        raise UserError("give either --count or --per-class, not both")
    if per_class is not None:
        count = per_class * len(named)
    total = default if count is None else count
    if not 1 <= total <= MAX_IMAGES:
        raise UserError(f"{total} images were asked for; 1 to {MAX_IMAGES} can be made")
    labels = balanced_labels(total, named)
    check_seed(seed, len(labels))
    check_whole("batch size", batch_size, least=1, most=MAX_IMAGES)
    sampling = Sampling(guidance, choice, algorithm, flow, diffusion)
    recorder = Recorder()
    making: Drawing | Searching | Editing = Drawing(sampling, seed, batch_size, precision, recorder)
    if edits:
        if search is not None:
            raise UserError("give either --search or an edit, not both")
        making = Editing(edit or Inpaint(), sampling, seed, batch_size, precision, recorder)
        read_material(making, image, mask, other, generator.image_size)
    elif search is not None:
        reference = None if image is None else read_pixels(image, generator.image_size)
        making = Searching(search, sampling, seed, reference, precision, recorder)
        asked_for = {"model": fingerprint(generator), "labels": labels, "texts": texts}
        making.keep_journal(Path(f"{out}.search"), asked_for)
    elif image is not None:
        raise UserError(
            "--image alone says not what to do: give a --mask, an --edit, or a --search that compares with it"
        )
    part = shard_of(shard)
    if keeps and not png:
        raise UserError("--resume and --shard keep the images as PNG: leave --no-png out")
    if keeps and (search is not None or edits):
        raise UserError(
            "--resume and --shard are for plain samples: a --search goes on by its own journal, an edit is made anew"
        )
    if distributed.rank() == 0:
        kinds = ("class", "classes") if texts is None else ("prompt", "prompts")
        asked = f"{len(labels):,} images of {count_of(len(named), *kinds)}"
        log.info("%s by %s; writes %s", asked, model, out)
    titles = generator.class_names if texts is None else texts
    # What the images depend on.
    plan = {
        "fingerprint": fingerprint(generator),
        "sampling": sampling.describe(),
        "count": len(labels),
        **_what(named, texts, generator.class_names),
        "seed": seed,
        "precision": precision,
        **({} if shown is None else {"size": list(shown)}),
    }
    if finished:
        if holds_set(Path(out), plan, npz):
            if distributed.rank() == 0:
                print(f"all {len(labels)} images are there: {out}")
            return
        check_target(Path(out), RECORD, overwrite)
    start = time.perf_counter()
    wanted = None if texts is None else [texts[label] for label in labels]
    kept: KeptSet | None = None
    if keeps:
        place = Path(os.path.abspath(out))
        unfinished = place.with_name(f".{place.name}.unfinished")
        kept = KeptSet(unfinished, plan, lambda i: file_name(i, labels[i], titles))
        share = kept.missing(own_part(len(labels), part))
        _draw(making.batches(generator, labels, share, wanted), len(share), kept.write)
        if not _all_made(kept, len(labels)):
            return
    with _stage(Path(out), overwrite) as stage:
        pixels = generator.tokenizer.image_size
        folder = SampleFolder(stage, labels, pixels, png=png, npz=npz, grid=grid, titles=titles)
        share = distributed.own_share(len(labels))
        if kept is None:
            _draw(making.batches(generator, labels, share, wanted), len(share), folder.write)
        else:
            for index in share:
                folder.write([index], kept.read(index)[None])
        folder.finish()
        seconds = time.perf_counter() - start
        record = {
            "model": model,
            "weights": source.weights,
            **plan,
            "seeds": f"image i has seed {seed} + i",
            "device": str(next(generator.parameters()).device),
            "processes": distributed.world_size(),
            "seconds": round(seconds, 3),
            "decoding": recorder.report().as_dict(),
            **making.facts(),
            "torch": torch.__version__,
        }
        if distributed.rank() == 0:
            text = json.dumps(record, indent=1) + "\n"
            (stage / RECORD).write_text(text, encoding="utf-8")
    if distributed.rank() == 0:
        making.finish()
        if kept is not None:
            shutil.rmtree(kept.folder, ignore_errors=True)
        print(
            f"{len(labels)} images in {seconds:.1f} s ({len(labels) / seconds:.1f} images/s): {out}"
        )
        whose = "this process: " if distributed.world_size() > 1 else ""
        print(f"{whose}{recorder.report()}")


def _load(path: str, raw: bool, device: str) -> tuple[Source, ImageGenerator]:
    source = read_source(path, raw=raw)
    if source.kind != "generator":
        raise UserError(f"{path} is a tokenizer; a generator is needed to sample")
    generator = assemble(source)
    assert isinstance(generator, ImageGenerator)
    return source, generator.to(pick_device(device))


def size_of(numbers: list[int] | None) -> tuple[int, int] | None:
    """(height, width) of `--size 24 16`, or of one side; raises UserError for other numbers."""
    if numbers is None:
        return None
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise UserError(f"--size is {numbers}; it is a side, or height and width, in pixels")
    return numbers[0], numbers[-1]


def holds_set(folder: Path, plan: dict[str, Any], npz: bool) -> bool:
    """Whether the finished set in `folder` is that of `plan`, its npz with it where that is asked for."""
    record = read_json(folder / RECORD)
    wanted = json.loads(json.dumps(plan))
    same = isinstance(record, dict) and all(record.get(key) == wanted[key] for key in wanted)
    return same and (not npz or (folder / "samples.npz").is_file())


def read_material(
    editing: Editing,
    image: str | None,
    mask: str | None,
    other: str | None,
    size: tuple[int, int],
) -> None:
    """The pictures of an edit; raises UserError for what it needs and is not there, or cannot be read."""
    if image is None:
        if mask is not None or other is not None or editing.edit.needs_picture:
            raise UserError(f"{type(editing.edit).__name__} needs a picture: --image FILE")
        return
    editing.picture = read_pixels(image, size)
    if mask is not None:
        editing.mask = read_mask(mask, image, size)
    if other is not None:
        editing.other = read_pixels(other, size)


def parse_classes(text: str, model: ImageGenerator) -> list[int]:
    """Class ids of `all`, `3`, `bag,3,5` or `0-9,12`; raises UserError for what is no class of the
    model.
    """
    try:
        return model.class_ids(text)
    except UserError as error:
        if not isinstance(model.conditioner, ClassConditioner):
            raise
        raise UserError(f"--classes {text!r}: {error}") from error


def read_prompts(path: str, model: ImageGenerator) -> list[str]:
    """Lines of a text file that are not empty; raises UserError where there are none or the model
    reads no text.
    """
    if not isinstance(model.conditioner, TextConditioner):
        raise UserError("--prompts needs a generator that is conditioned on text; this one is not")
    try:
        lines = decode_text(Path(path).read_bytes(), f"--prompts {path}").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt; it needs one a line")
    return prompts


def _what(named: list[int], texts: list[str] | None, class_names: Sequence[str]) -> dict[str, Any]:
    """What the images are of, for the record."""
    if texts is None:
        known = {"class_names": list(class_names)} if class_names else {}
        return {"classes": named, "labels": "image i has class classes[i % len(classes)]", **known}
    return {"prompts": texts, "labels": "image i has prompt prompts[i % len(prompts)]"}


@contextmanager
def _stage(target: Path, overwrite: bool) -> Iterator[Path]:
    """One staged folder that all processes write into."""
    if distributed.rank() > 0:
        yield Path(distributed.broadcast(None))
        distributed.barrier()
        return
    with staged_folder(target, RECORD, overwrite) as stage:
        distributed.broadcast(str(stage))
        yield stage
        distributed.barrier()


def _draw(batches: Batches, count: int, write: Callable[[Sequence[int], Tensor], None]) -> None:
    """Write the `count` images of this process as they are made, and say how far it is."""
    with Progress("sampling", count, "images", quiet=distributed.rank() > 0) as bar:
        for indices, images in batches:
            write(indices, images)
            bar.update(len(indices))


def _all_made(kept: KeptSet, count: int) -> bool:
    """Whether a set is complete, by all processes and machines together; says it where it is not."""
    distributed.barrier()
    kept.look()
    missing = len(kept.missing(range(count)))
    if missing and distributed.rank() == 0:
        print(f"{count - missing} of {count} images are in {kept.folder}")
    return not missing


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `sample.py` and `tessellar sample`."""
    with distributed.session():
        refuse_older(sys.argv[1:] if argv is None else argv)
        run_functions(sample, argv, "sample")

"""Two pictures of a trained generator: six edits of one picture, and a beam as it grows.

    python benchmarks/studies/edits_and_beams.py MODEL --image X.png --class-name star [--other Y.png] [--out DIR]

`edits.png` has a row an edit: the picture, what is kept of it, and drawings of `--draws` seeds. `beam.png` has a row a
step: what each kept sequence shows after so many entities, best first. `pictures.json` has the laws, scores and
verifier calls.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tessellar.data.pixels import read_pixels
from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator, load_generator
from tessellar.protocol.guidance import Constant
from tessellar.sampling.editing.edits import (
    ClassEdit,
    Continue,
    Edit,
    Inpaint,
    Interpolate,
    Outpaint,
    Swap,
)
from tessellar.sampling.editing.run import Editing
from tessellar.sampling.grid import picture_grid
from tessellar.sampling.output import save_png
from tessellar.sampling.search.beam import Beam
from tessellar.sampling.search.schedules import Even
from tessellar.sampling.search.searching import PartialDecoder, Task
from tessellar.sampling.search.verifiers import Likelihood, Subject
from tessellar.sampling.settings import Sampling


def edits_of(model: ImageGenerator, other_class: str) -> dict[str, Edit]:
    """The six edits by their names; masks are for tokens that have a place."""
    half = model.generator.entities.count // 2
    return {
        "in-painting": Inpaint(particles=8),
        "out-painting": Outpaint(),
        "continuation": Continue(half),
        "class edit": ClassEdit(0.5),
        "interpolation": Interpolate(other_class),
        "swap": Swap(),
    }


def middle(size: tuple[int, int]) -> Tensor:
    """A mask of the middle quarter of pictures (height, width)."""
    height, width = size
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    return mask


def picture_of_edits(
    model: ImageGenerator, args: argparse.Namespace, sampling: Sampling
) -> tuple[Tensor, dict[str, dict]]:
    """A row an edit, and what the record of each says."""
    size = model.image_size
    picture = read_pixels(args.image, size)
    other = read_pixels(args.other or args.image, size)
    mask = middle(size)
    label = model.class_ids(args.class_name)[0]
    rows = []
    laws = {}
    names = []
    for name, edit in edits_of(model, args.second or args.class_name).items():
        masked = isinstance(edit, (Inpaint, Swap))
        drawn = isinstance(edit, Interpolate)
        editing = Editing(
            edit,
            sampling,
            picture=None if drawn else picture,
            other=other,
            mask=mask if masked else None,
        )
        labels = [label] * args.draws
        made: list[Tensor] = []
        for _, images in editing.batches(model, labels, range(args.draws)):
            made += list(images)
        shown = torch.where(mask, torch.ones(()), picture) if masked else picture
        rows.append([*to_uint8(torch.stack([picture, shown])), *made])
        laws[name] = editing.facts()["edit"]
        names.append(f"{name} ({laws[name]['law']})")
    heads = ["picture", "given", *(f"seed {seed}" for seed in range(args.draws))]
    return picture_grid(rows, row_labels=names, column_labels=heads), laws


@torch.no_grad()
def picture_of_a_beam(
    model: ImageGenerator, args: argparse.Namespace, sampling: Sampling
) -> tuple[Tensor, list[dict]]:
    """A row a step of a beam, and its scores."""
    label = model.class_ids(args.class_name)[0]
    count = model.generator.entities.count
    task = Task(
        generator=model.generator,
        tokenizer=model.tokenizer,
        condition=model.class_condition([label]),
        sampling=sampling,
        seed=0,
        subject=Subject(label=label, name=args.class_name),
    )
    every = max(1, count // args.steps)
    search = Beam(Likelihood(), width=args.width, candidates=8, schedule=Even(every=every))
    found = search(task)
    decoder = PartialDecoder(model.tokenizer, model.generator.entities, task.seed)
    rows = []
    facts = []
    for step in found.steps:
        images = to_uint8(decoder(step.tokens, step.known))
        blank = torch.full_like(images[0], 255)
        rows.append([*images, *[blank] * (args.width - len(images))])
        facts.append({"known": step.known, "scores": step.scores.tolist(), "calls": step.calls})
    names = [f"{step.known} of {count}" for step in found.steps]
    return picture_grid(rows, row_labels=names), facts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--image", required=True)
    parser.add_argument("--other", help="picture that the swap takes tokens of")
    parser.add_argument("--class-name", required=True, help="class to draw under")
    parser.add_argument("--second", help="class that the interpolation goes to")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="outputs/edits_and_beams")
    args = parser.parse_args(argv)
    model = load_generator(args.model)
    sampling = Sampling(guidance=Constant(args.guidance))
    edits, laws = picture_of_edits(model, args, sampling)
    beam, steps = picture_of_a_beam(model, args, sampling)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_png(edits, out / "edits.png")
    save_png(beam, out / "beam.png")
    facts = {"edits": laws, "beam": steps}
    (out / "pictures.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"edits.png, beam.png and pictures.json: {out}")


if __name__ == "__main__":
    main()

"""`evaluate.py t2i|clipscore`: samples for the scorers of text-to-image benchmarks, and how well
pictures fit their prompts by CLIP.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tessellar import distributed
from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli.evaluation_run import check_out
from tessellar.errors import UserError
from tessellar.evaluation.record import write_record
from tessellar.evaluation.sources import SAMPLE_NAME, FolderImages
from tessellar.evaluation.text_to_image import (
    LAYOUTS,
    ClipModel,
    clip_scores,
    clip_summary,
    seeds_of,
    write_text,
)
from tessellar.pipeline import ImageGenerator, assemble, pick_device
from tessellar.plain_data import read_json
from tessellar.processes.diffusion import AncestralDiffusion, DiffusionSampler
from tessellar.processes.flow import EulerMaruyama, Flow
from tessellar.progress import Progress
from tessellar.protocol.choice import Choice
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.packages import trust
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.kept import own_part, shard_of
from tessellar.sampling.run import as_uint8, check_seed
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner

log = logging.getLogger(__name__)
RECORD = "t2i.json"


def t2i(
    model: str,
    prompts: str = "",
    layout: Literal["geneval", "geneval2", "dpg"] = "geneval",
    out: str = "",
    guidance: GuidanceSchedule = Constant(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    algorithm: Algorithm = Ancestral(),  # noqa: B008
    flow: Flow = EulerMaruyama(),  # noqa: B008
    diffusion: DiffusionSampler = AncestralDiffusion(),  # noqa: B008
    seed: int = 0,
    precision: Literal["float32", "bf16"] = "float32",
    raw: bool = False,
    package: str = "",
    shard: str | None = None,
    device: str = "auto",
) -> None:
    """Write samples of a text-to-image benchmark in the folders that its official scorer reads.

    Args:
        model: export folder, .safetensors, .ckpt or hub id of a generator that reads text
        prompts: the benchmark's own file: evaluation_metadata.jsonl, geneval2_data.jsonl, or DPG-Bench's folder of .txt
        layout: geneval (four images a prompt), geneval2 (one), or dpg (a grid of 2 x 2)
        out: folder to write; images that are there stay, so an interrupted export goes on
        guidance: classifier-free guidance, a schedule over the entities (Constant); scale 1 is none
        choice: how a token is drawn from its probabilities
        algorithm: decoding algorithm, such as SpeculativeJacobi
        flow: how tokens of a flow-matching generator are drawn
        diffusion: how tokens of a generator with a diffusion head are drawn
        seed: image k of prompt p is drawn with a seed made of this, p and k
        precision: arithmetic of the generator
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        shard: make only the part 1/4, 2/4, ... of the prompts
        device: auto, cpu, cuda, ...
    """
    trust(package)
    check_seed(seed)
    if not prompts or not out:
        raise UserError("say which prompts and where to write: --prompts FILE --out FOLDER")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    part = shard_of(shard)
    how = LAYOUTS[layout]
    asked = how.prompts(Path(prompts))
    source = read_source(model, raw=raw)
    generator = assemble(source)
    if not isinstance(generator, ImageGenerator) or not isinstance(
        generator.conditioner, TextConditioner
    ):
        raise UserError(f"{model} reads no text; a text-to-image generator is needed")
    generator = generator.to(pick_device(device))
    sampling = Sampling(guidance, choice, algorithm, flow, diffusion)
    facts = {
        "layout": layout,
        "prompts": [prompt.text for prompt in asked],
        "fingerprint": fingerprint(generator),
        "weights": source.weights,
        "sampling": sampling.describe(),
        "seed": seed,
        "precision": precision,
    }
    _same_export(folder, facts)
    todo = [p for p in own_part(len(asked), part) if not how.is_made(folder, asked[p])]
    if distributed.rank() == 0:
        log.info("%d of %d prompts are to be drawn; writes %s", len(todo), len(asked), out)
    with Progress("sampling", len(todo), "prompts", quiet=distributed.rank() > 0) as bar:
        for place in todo:
            seeds = seeds_of(seed, place, how.images)
            images = _draw(generator, asked[place].text, sampling, seeds, precision)
            how.write(folder, asked[place], images)
            bar.update()
    distributed.barrier()
    missing = sum(not how.is_made(folder, prompt) for prompt in asked)
    if distributed.rank() == 0:
        if not missing:
            for path, text in how.lists(folder, asked).items():
                write_text(text, path)
        print(f"{len(asked) - missing} of {len(asked)} prompts x {how.images} images are in {out}")


def _same_export(folder: Path, facts: dict[str, Any]) -> None:
    """Write what an export is made of, or raise UserError, on all processes, where it is another."""
    failure = None
    if distributed.rank() == 0:
        wanted = json.loads(json.dumps(facts))
        place = folder / RECORD
        if place.is_file():
            there = read_json(place)
            known = there if isinstance(there, dict) else {}
            keys = [key for key in wanted if known.get(key) != wanted[key]]
            if keys:
                failure = (
                    f"{folder} holds another export (other {', '.join(keys)}); choose another --out"
                )
        elif folder.is_dir() and any(folder.iterdir()):
            failure = f"{folder} is not empty and holds no {RECORD}; choose another --out"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", place)
    failure = distributed.broadcast(failure)
    if failure:
        raise UserError(failure)


def _draw(
    model: ImageGenerator, text: str, sampling: Sampling, seeds: list[int], precision: str
) -> Tensor:
    """Images of one prompt, uint8 [n, 3, H, W]."""
    assert isinstance(model.conditioner, TextConditioner)
    condition = model.conditioner.of_texts([text] * len(seeds))
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        tokens = model.sample_tokens(condition, sampling, seeds)
    return as_uint8(model.decode(tokens))


def clipscore(
    samples: str,
    clip: str = "",
    prefix: str = "",
    out: str = "",
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """CLIPScore of a folder that sample.py --prompts wrote: how well pictures fit their prompts.

    Args:
        samples: folder of sample.py --prompts
        clip: CLIP model of transformers: local folder or hub id (openai/clip-vit-base-patch32)
        prefix: what stands before each prompt (LlamaGen's evaluation takes "a photo depicts ")
        out: JSON record to write (default: only printed)
        batch_size: images at once
        device: auto, cpu, cuda, ...
    """
    check_out(out)
    if not clip:
        raise UserError(
            "say which CLIP model: --clip FOLDER or a hub id, openai/clip-vit-base-patch32"
        )
    source = FolderImages(samples)
    said = read_json(Path(samples) / "samples.json") if source.made else {}
    texts = said.get("prompts") if isinstance(said, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{samples} does not say the prompts of its images: sample.py --prompts does"
        )
    places = [_prompt_of(file, len(texts), samples) for file in source.files]
    named = [prefix + texts[place] for place in places]
    network = ClipModel(clip, pick_device(device))
    images = (batch.images[0] for batch in source.batches(1))
    cosines = clip_scores(images, named, network, batch_size)
    values = {f"{name} ({network.name})": value for name, value in clip_summary(cosines).items()}
    if distributed.rank() == 0:
        for name, value in values.items():
            print(f"{name} {value:.5g}")
        print(f"{len(named)} images of {len(texts)} prompts, prefix {prefix!r}")
        if out:
            record = {
                "metrics": values,
                "samples": source.describe(),
                "clip": clip,
                "prefix": prefix,
                "prompts": len(texts),
            }
            write_record(record, out)


def _prompt_of(file: str, count: int, where: str) -> int:
    """Which prompt an image is of: sample.py's files are <index>_<prompt>_<words>.png."""
    name = Path(file).name
    place = int(name.split("_")[1]) if SAMPLE_NAME.fullmatch(name) else count
    if place >= count:
        raise UserError(f"{where}/{file}: its prompt is not in samples.json")
    return place

"""Text-to-image benchmarks: samples in the folders that their official scorers read, and CLIPScore.

GenEval (arXiv 2310.11513): `OUT/00000/metadata.jsonl` with the prompt file's own line, four images
`OUT/00000/samples/00000.png`. GenEval 2: one image a prompt and `images.json`, {prompt: path}.
DPG-Bench (arXiv 2403.05135): `OUT/<item>.png`, a grid of 2 x 2 images without a gap, row by row.
The scorers run on them unchanged. Image k of prompt p has a seed of its own, so that an interrupted
export goes on with the very same images; a file that is there is never written again.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from tessellar.data.captions import decode_text
from tessellar.errors import UserError, check_is_file, writing
from tessellar.plain_data import parse_json
from tessellar.randomness import derive
from tessellar.sampling.output import save_png


class Prompt(NamedTuple):
    """One line of a benchmark: its `name` in file names, its text, and what its file says of it."""

    name: str
    text: str
    line: str = ""


@dataclass(frozen=True)
class BenchmarkLayout(ABC):
    """How a benchmark's scorer finds prompts and images; `images` is their number a prompt."""

    images: int

    @abstractmethod
    def prompts(self, path: Path) -> list[Prompt]:
        """The prompts of the benchmark's own file or folder."""

    @abstractmethod
    def is_made(self, out: Path, prompt: Prompt) -> bool:
        """Whether everything of a prompt is there."""

    @abstractmethod
    def write(self, out: Path, prompt: Prompt, images: Tensor) -> None:
        """The images of one prompt, uint8 [images, 3, H, W]."""

    def lists(self, out: Path, prompts: Sequence[Prompt]) -> dict[Path, str]:
        """Text files that are written once all images are there."""
        return {}


@dataclass(frozen=True)
class GenEval(BenchmarkLayout):
    """evaluation_metadata.jsonl: lines with `prompt`, `tag`, `include`."""

    images: int = 4

    def prompts(self, path: Path) -> list[Prompt]:
        rows = read_lines(path, "prompt")
        return [Prompt(f"{i:05d}", row["prompt"], line) for i, (line, row) in enumerate(rows)]

    def is_made(self, out: Path, prompt: Prompt) -> bool:
        folder = out / prompt.name
        files = [folder / "samples" / f"{k:05d}.png" for k in range(self.images)]
        return all(file.is_file() for file in (*files, folder / "metadata.jsonl"))

    def write(self, out: Path, prompt: Prompt, images: Tensor) -> None:
        folder = out / prompt.name
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        for k, image in enumerate(images):
            write_once(image, folder / "samples" / f"{k:05d}.png")
        write_text(prompt.line + "\n", folder / "metadata.jsonl")


@dataclass(frozen=True)
class GenEval2(BenchmarkLayout):
    """geneval2_data.jsonl: lines with `prompt`, `vqa_list`, `skills`."""

    images: int = 1

    def prompts(self, path: Path) -> list[Prompt]:
        rows = read_lines(path, "prompt")
        return [Prompt(f"{i:05d}", row["prompt"], line) for i, (line, row) in enumerate(rows)]

    def file(self, out: Path, prompt: Prompt) -> Path:
        return out / "images" / f"{prompt.name}.png"

    def is_made(self, out: Path, prompt: Prompt) -> bool:
        return self.file(out, prompt).is_file()

    def write(self, out: Path, prompt: Prompt, images: Tensor) -> None:
        (out / "images").mkdir(parents=True, exist_ok=True)
        write_once(images[0], self.file(out, prompt))

    def lists(self, out: Path, prompts: Sequence[Prompt]) -> dict[Path, str]:
        paths = {prompt.text: str(self.file(out, prompt)) for prompt in prompts}
        return {out / "images.json": json.dumps(paths, indent=1, ensure_ascii=False) + "\n"}


@dataclass(frozen=True)
class DPG(BenchmarkLayout):
    """A folder of prompts, `<item>.txt` each."""

    images: int = 4

    def prompts(self, path: Path) -> list[Prompt]:
        if not path.is_dir():
            raise UserError(
                f"{path} is no folder; the prompts of DPG-Bench are a folder of .txt files"
            )
        found = []
        for file in sorted(path.glob("*.txt")):
            text = _text_of(file).strip()
            if not text:
                raise UserError(f"{file} holds no prompt")
            found.append(Prompt(file.stem, text))
        if not found:
            raise UserError(f"{path} holds no .txt files, of which the prompts of DPG-Bench are")
        return found

    def is_made(self, out: Path, prompt: Prompt) -> bool:
        return (out / f"{prompt.name}.png").is_file()

    def write(self, out: Path, prompt: Prompt, images: Tensor) -> None:
        out.mkdir(parents=True, exist_ok=True)
        grid = rearrange(images, "(r c) d h w -> d (r h) (c w)", r=2, c=2)
        write_once(grid, out / f"{prompt.name}.png")


LAYOUTS: dict[str, BenchmarkLayout] = {
    "geneval": GenEval(),
    "geneval2": GenEval2(),
    "dpg": DPG(),
}


def seeds_of(seed: int, prompt: int, images: int) -> list[int]:
    """Seeds of the images of a prompt: of the pair of their numbers, whatever else is made."""
    return [derive(seed, prompt, k) for k in range(images)]


def write_once(image: Tensor, path: Path) -> None:
    """A PNG, whole or not at all; one that is there stays."""
    if path.exists():
        return
    staged = path.with_name(f".{path.name}.{os.getpid()}.png")
    save_png(image, staged)
    staged.replace(path)


def write_text(text: str, path: Path) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, unfinished=staged):
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)


def read_lines(path: Path, needed: str) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a JSON Lines file with what they hold; raises UserError, naming the line, for one
    without the text `needed`.
    """
    rows = []
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}: line {number}")
        if not isinstance(row, dict) or not isinstance(row.get(needed), str):
            raise UserError(
                f"{path}: line {number} has no {needed!r}: is it the benchmark's own file?"
            )
        rows.append((line, row))
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows


def _text_of(path: Path) -> str:
    check_is_file(path)
    try:
        return decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def clip_scores(
    images: Iterator[Tensor], texts: Sequence[str], clip: "ClipModel", batch_size: int = 64
) -> Tensor:
    """Cosine of the embeddings of image i, uint8 [3, H, W], and `texts[i]`; float32 [N]."""
    found = []
    held: list[Tensor] = []
    done = 0
    for image in images:
        held.append(image)
        if len(held) == batch_size:
            found.append(clip.cosines(held, texts[done : done + len(held)]))
            done += len(held)
            held = []
    if held:
        found.append(clip.cosines(held, texts[done : done + len(held)]))
    return torch.cat(found)


class ClipModel:
    """A CLIP model of `transformers`, local folder or hub id: safetensors, and never code that came
    with it.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from tessellar.text.bpe import require
        from tessellar.text.encoders import published_vocabulary

        library = require("transformers")
        try:
            config = library.AutoConfig.from_pretrained(source, trust_remote_code=False)
            if config.model_type != "clip":
                raise UserError(f"{source} is a {config.model_type}; CLIPScore needs a CLIP model")
            self.words = published_vocabulary(source)
            model = library.CLIPModel.from_pretrained(source, use_safetensors=True)
        except UserError:
            raise
        except Exception as error:  # transformers raises many kinds for files that do not fit
            first = " ".join(str(error).split())[:160]
            raise UserError(f"the CLIP model {source} cannot be loaded ({first})") from error
        self.name = str(source).rstrip("/").rpartition("/")[2]
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.size = int(config.vision_config.image_size)
        self.length = int(config.text_config.max_position_embeddings)
        self.device = torch.device(device)

    @torch.no_grad()
    def cosines(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Cosines [B], on the CPU; images are resized as CLIP's own are: Pillow's bicubic of 8 bits."""
        from tessellar.evaluation.networks.resize import pil_bicubic
        from tessellar.networks.standard import CLIP

        pixels = torch.cat([pil_bicubic(image[None], (self.size, self.size)) for image in images])
        mean, std = (torch.tensor(values)[:, None, None] for values in CLIP)
        x = ((pixels / 255 - mean) / std).to(self.device)
        read = self.words(
            list(texts),
            max_length=self.length,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        # The projected embeddings, of unit length.
        output = self.model(
            pixel_values=x, input_ids=read["input_ids"], attention_mask=read["attention_mask"]
        )
        return (output.image_embeds * output.text_embeds).sum(dim=1).cpu()


def clip_summary(cosines: Tensor) -> dict[str, float]:
    """The ways in which the field prints them."""
    clamped = cosines.clamp(min=0)
    return {
        "cosine": float(cosines.mean()),
        "CLIPScore x100": 100 * float(clamped.mean()),
        "CLIPScore x2.5": 2.5 * float(clamped.mean()),
    }

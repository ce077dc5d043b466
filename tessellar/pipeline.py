"""ImageGenerator: a frozen tokenizer, a generator and its conditioner, which together turn
conditions into images.

`load` gives one, or a Tokenizer, from an export, one safetensors file, a training checkpoint or a
hub id.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, overload

import torch
from PIL import Image
from torch import Tensor, nn

from tessellar.checkpoints.reading import Source, read_source
from tessellar.errors import UserError
from tessellar.images import Pictures, to_pil, to_uint8
from tessellar.protocol.class_names import Classes, class_ids
from tessellar.protocol.condition import ClassConditioner, Condition, Conditioner
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import GuidanceSchedule
from tessellar.protocol.packages import trusting
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.prepare import WeightLayout, prepared
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner


class ImageGenerator(nn.Module):
    """A tokenizer, a generator of its tokens and what reads the generator's condition.

    `class_names[k]` is the name of class k; empty where names are not known, or the generator reads
    text. Raises UserError where the generator was built for another layout than the tokenizer's: it
    may be that of its first tokens, where they can be decoded alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator,
        conditioner: Conditioner,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not tokenizer.layout.starts_with(generator.layout):
            raise UserError(
                f"the generator was built for {generator.layout}, but the tokenizer gives {tokenizer.layout}"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.generator = generator
        self.conditioner = conditioner
        generator.bind(tokenizer)
        self.class_names = tuple(class_names)

    def train(self, mode: bool = True) -> "ImageGenerator":
        """The tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.tokenizer.image_size

    def take_size(self, image_size: tuple[int, int]) -> None:
        """Make images of another size (height, width) from now on, with the same weights; for models
        that were trained on several sizes. Raises UserError where tokenizer or generator cannot.
        """
        before = self.tokenizer.image_size
        self.tokenizer.take_size(image_size)
        try:
            self.generator.take_layout(self.tokenizer.layout)
        except UserError:
            self.tokenizer.take_size(before)
            raise

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None for a generator that reads text."""
        conditioner = self.conditioner
        return conditioner.num_classes if isinstance(conditioner, ClassConditioner) else None

    @overload
    def sample(
        self,
        classes: Condition,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        *,
        guidance: float | GuidanceSchedule | None = None,
        seed: int = 0,
        batch_size: int = 64,
        output: Literal["tensor", "uint8"] | None = None,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        classes: Classes | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        count: int | None = None,
        guidance: float | GuidanceSchedule | None = None,
        seed: int = 0,
        batch_size: int = 64,
        output: Literal["pil"] | None = None,
    ) -> list[Image.Image]: ...

    @overload
    def sample(
        self,
        classes: Classes | Condition | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        count: int | None = None,
        guidance: float | GuidanceSchedule | None = None,
        seed: int = 0,
        batch_size: int = 64,
        output: Literal["tensor", "uint8"],
    ) -> Tensor: ...

    @torch.no_grad()
    def sample(
        self,
        classes: Classes | Condition | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        count: int | None = None,
        guidance: float | GuidanceSchedule | None = None,
        seed: int = 0,
        batch_size: int = 64,
        output: Literal["pil", "tensor", "uint8"] | None = None,
    ) -> Tensor | list[Image.Image]:
        """One image for each class or prompt, or `count` images going round them.

        `classes` are names, ids, a list of both, or a text such as `bag,3,5-9` (default: all);
        `prompts` one text or several, for a generator that reads text; or give a Condition.
        `guidance` is a scale or a schedule, in place of that of `sampling`. Image i depends on its
        own seed, `seed + i` or `seeds[i]`, and its class or prompt alone. `output`: `pil`, `tensor`
        (floats [B, 3, H, W], about [-1, 1]), or `uint8` (a tensor); by default PIL images, and
        floats of a Condition. Raises UserError, a ValueError, for what the generator does not know.
        """
        if output not in (None, "pil", "tensor", "uint8"):
            raise UserError(f"output is {output!r}; there are pil, tensor and uint8")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        if isinstance(classes, Condition):
            condition = classes
            output = output or "tensor"
        else:
            condition = self._condition(classes, prompts, count)
        settings = sampling or Sampling()
        if guidance is not None:
            settings = replace(settings, guidance=guidance)
        numbers = range(seed, seed + condition.batch) if seeds is None else seeds
        if isinstance(numbers, int) or len(numbers) != condition.batch:
            raise UserError(f"{condition.batch} images need as many seeds, not {numbers!r}")
        parts = []
        with self.prepared_for(settings):
            for rows in torch.arange(condition.batch).split(batch_size):
                chosen = [numbers[row] for row in rows.tolist()]
                tokens = self.sample_tokens(condition.select(rows), settings, chosen)
                parts.append(self.decode(tokens))
        images = torch.cat(parts)
        if output == "tensor":
            return images
        return to_uint8(images) if output == "uint8" else to_pil(images)

    def _condition(
        self, classes: Classes | None, prompts: str | Sequence[str] | None, count: int | None
    ) -> Condition:
        """The condition of classes or prompts, going round them up to `count`."""
        if count is not None and count < 1:
            raise UserError(f"count is {count}; at least 1 image can be made")
        if prompts is None:
            ids = self.class_ids("all" if classes is None else classes)
            return self.class_condition(list(islice(cycle(ids), count or len(ids))))
        if classes is not None:
            raise UserError("give either classes or prompts, not both")
        if not isinstance(self.conditioner, TextConditioner):
            raise UserError("this generator reads class ids, not text: give classes")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise UserError("no prompt is given")
        return self.conditioner.of_texts(list(islice(cycle(texts), count or len(texts))))

    @torch.no_grad()
    def encode(self, images: Pictures) -> Tensor:
        """Tokens of images, as the tokenizer encodes them."""
        return self.tokenizer.encode(images)

    def prepared_for(self, sampling: Sampling) -> AbstractContextManager[None]:
        """Within it the generator is prepared once for all batches that are drawn."""
        layout: WeightLayout = "int8" if sampling.algorithm.int8 else "auto"
        if sampling.algorithm.compile:
            layout = "plain"  # packed weights are none that a compiler can read
        return prepared(self.generator, layout=layout)

    @torch.no_grad()
    def sample_tokens(
        self,
        condition: Condition,
        sampling: Sampling,
        seeds: Sequence[int],
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Tokens [B, N, ...] of the conditions, drawn by the prepared generator; a `recorder`
        counts evaluations.
        """
        mode = self.generator.training
        self.generator.eval()
        try:
            with self.prepared_for(sampling):
                return sampling.tokens(self.generator, condition, seeds, recorder)
        finally:
            self.generator.train(mode)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of tokens."""
        return self.tokenizer.decode(tokens)

    def class_ids(self, classes: Classes) -> list[int]:
        """Ids of classes by names, ids, or a text such as `bag,3,5-9` or `all`; raises UserError for
        what is no class, or a generator that is not class-conditional.
        """
        if self.num_classes is None:
            self.class_condition([0])  # raises, saying what the generator reads
        assert self.num_classes is not None
        return class_ids(classes, self.num_classes, self.class_names)

    def class_condition(self, labels: Sequence[int]) -> Condition:
        """Condition of class ids; raises UserError for unknown ids or a generator that is not
        class-conditional.
        """
        if not isinstance(self.conditioner, ClassConditioner):
            raise UserError(
                "this generator is conditioned on text, not on class ids: give prompts (--prompts FILE)"
            )
        return self.conditioner.of_labels(torch.as_tensor(labels, dtype=torch.int64))


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    raw: bool = False,
    trust: Sequence[str] = (),
) -> Tokenizer | ImageGenerator:
    """The model at `path`: an export's folder or safetensors file, a `.ckpt`, or a hub id
    `owner/name[@revision]`.

    Checkpoints give the averaged weights where there are any, or with `raw` those of the last step.
    Packages of others that `trust` names are imported, and their classes may be built. On `device`,
    in `dtype` (default: as stored), in eval mode. Raises UserError, in one line, for whatever cannot
    be loaded.
    """
    with trusting(trust):
        model = assemble(read_source(path, raw=raw))
    return model.to(device=pick_device(device), dtype=dtype)


def load_generator(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    raw: bool = False,
    trust: Sequence[str] = (),
) -> ImageGenerator:
    """As `load`, but only a generator will do."""
    model = load(path, device=device, dtype=dtype, raw=raw, trust=trust)
    if not isinstance(model, ImageGenerator):
        raise UserError(f"{path} is a tokenizer; a generator is needed here")
    return model


def load_tokenizer(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    raw: bool = False,
    trust: Sequence[str] = (),
    image_size: tuple[int, int] | None = None,
) -> Tokenizer:
    """As `load`, but only a tokenizer will do.

    With `image_size` (height, width) it takes images of that size, rectangles too, where none of
    its weights follow from the size: convolutional tokenizers. Raises UserError for others.
    """
    with trusting(trust):
        source = read_source(path, raw=raw)
        if source.kind != "tokenizer":
            raise UserError(f"{path} is a generator; a tokenizer is needed here (it holds its own)")
        if image_size is not None:
            source = _of_size(source, image_size)
        model = source.tokenizer()
    return model.to(device=pick_device(device), dtype=dtype)


def _of_size(source: Source, image_size: tuple[int, int]) -> Source:
    """The same tokenizer for images of another size; raises UserError where it cannot be one."""
    config = source.description["tokenizer"]
    height, width = image_size
    arguments = {**source.arguments("tokenizer"), "image_size": [height, width]}
    changed = {**config, "init_args": arguments}
    resized = replace(source, description={**source.description, "tokenizer": changed})
    try:
        resized.tokenizer()
    except UserError as error:
        raise UserError(
            f"{source.where} cannot take images of {height} x {width}: either its stride does not divide "
            f"them, or its weights are made for one size, and it is to be fine-tuned with init_from ({error})"
        ) from error
    return resized


def pick_device(name: str | torch.device) -> torch.device:
    """`auto` is the GPU if there is one; raises UserError for a device that does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:  # each backend has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"device {str(name)!r} is not available here ({reason})") from error
    if device.type == "meta":
        raise UserError("device 'meta' holds no values: take auto, cpu or cuda")
    return device


def assemble(source: Source) -> Tokenizer | ImageGenerator:
    """The model of a source."""
    source.check()
    if source.kind == "tokenizer":
        return source.tokenizer()
    names = source.class_names
    parts = [source.build(part) for part in ("tokenizer", "generator", "conditioner")]
    return ImageGenerator(*parts, class_names=names).eval()

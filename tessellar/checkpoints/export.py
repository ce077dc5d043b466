"""Exports: a folder that holds a model and says what it is, for sharing, sampling and evaluating.
No pickle anywhere.

`config.yaml` describes the parts; `model.safetensors` holds their tensors under `tokenizer.`,
`generator.`, `conditioner.` and `discriminator.`, and the same description in its metadata, so that
this one file is enough; `README.md` is the model card.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from tessellar.checkpoints.card import Record, card
from tessellar.checkpoints.citations import bibtex, papers_of
from tessellar.checkpoints.description import CLASS_NAMES, HEADER_KEY, describe_model
from tessellar.checkpoints.staging import staged_folder
from tessellar.protocol.condition import ClassConditioner, Conditioner
from tessellar.protocol.generator import Generator
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tensor_files import write_safetensors

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
CARD = "README.md"


class GeneratorParts(Protocol):
    """What an export of a generator holds; `tessellar.pipeline.ImageGenerator` is one."""

    tokenizer: Tokenizer
    generator: Generator
    conditioner: Conditioner
    class_names: tuple[str, ...]


def export_tokenizer(
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    discriminator: nn.Module | None = None,
    record: Record | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a tokenizer, with the discriminator that it was trained against where one is given (for
    fine-tuning).

    Raises UserError where `folder` exists: an export is replaced with `overwrite`, anything else
    never.
    """
    parts = {"tokenizer": tokenizer, "discriminator": discriminator}
    return export_parts(parts, folder, record=record, overwrite=overwrite)


def export_generator(
    model: GeneratorParts,
    folder: str | Path,
    *,
    record: Record | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a generator together with its tokenizer and conditioner, complete in itself.

    Raises UserError where `folder` exists: an export is replaced with `overwrite`, anything else
    never.
    """
    parts = {
        "tokenizer": model.tokenizer,
        "generator": model.generator,
        "conditioner": model.conditioner,
    }
    names = model.class_names
    return export_parts(parts, folder, record=record, overwrite=overwrite, class_names=names)


def export_parts(
    parts: Mapping[str, nn.Module | None],
    folder: str | Path,
    *,
    record: Record | None = None,
    overwrite: bool = False,
    class_names: Sequence[str] = (),
) -> Path:
    """Write the parts of a model (tokenizer, generator, conditioner, discriminator) by their names.

    `class_names[k]` is the name of class k, where names are known. Raises UserError where `folder`
    exists: an export is replaced with `overwrite`, anything else never.
    """
    description = describe_model(**parts)  # type: ignore[arg-type]
    if class_names:
        description[CLASS_NAMES] = list(class_names)
    kind = description["kind"]
    if kind == "generator" and not isinstance(parts.get("conditioner"), ClassConditioner):
        kind = "text generator"
    return _export(description, parts, folder, kind, record, overwrite)


def _export(
    description: dict[str, Any],
    parts: Mapping[str, nn.Module | None],
    folder: str | Path,
    kind: str,
    record: Record | None,
    overwrite: bool,
) -> Path:
    folder = Path(folder)
    record = record or Record()
    modules: dict[str, nn.Module] = {}
    for part, module in parts.items():
        if module is not None and part in description:
            modules[part] = module
    description = {**description, "record": record.as_dict()}
    tensors = flatten(modules)
    with staged_folder(folder, WEIGHTS, overwrite) as stage:
        (stage / CONFIG).write_text(
            yaml.safe_dump(description, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        (stage / CARD).write_text(
            card(
                kind,
                folder.name,
                record,
                facts=facts_of(modules),
                class_names=description.get(CLASS_NAMES, ()),
                citations=bibtex(papers_of(description)),
            ),
            encoding="utf-8",
        )
        write_safetensors(tensors, stage / WEIGHTS, {HEADER_KEY: json.dumps(description)})
    return folder


def flatten(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """State dicts in one, names prefixed by their part; contiguous on the CPU, each tensor with
    memory of its own.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage()
            shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
            tensors[f"{part}.{name}"] = tensor.clone() if shared else tensor
            seen.add(storage.data_ptr())
    return tensors


def facts_of(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Lines about the parts of a model, for its card."""
    facts = {}
    dtypes = set()
    for part, module in modules.items():
        count = sum(p.numel() for p in module.parameters())
        dtypes |= {str(p.dtype).removeprefix(f"{torch.__name__}.") for p in module.parameters()}
        facts[part] = f"`{type(module).__name__}`, {count:,} parameters"
        if isinstance(module, Tokenizer):
            facts["layout"] = str(module.layout)
            facts["image size"] = " x ".join(map(str, module.image_size))
    facts["dtype"] = ", ".join(sorted(dtypes))
    return facts

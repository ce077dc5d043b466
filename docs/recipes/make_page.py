"""Write imagenet256.md from the recorded recipes (tests/golden), the YAMLs (configs/imagenet256) and the lists here.

    python docs/recipes/make_page.py

A test compares the page with what this makes of them.
"""

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tessellar.cli.recipes import (
    Entry,
    Facts,
    compare,
    facts_of,
    read_differences,
    read_entries,
    read_recipe,
    read_recorded,
    recorded_facts,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "configs" / "imagenet256"
GOLDEN = ROOT / "tests" / "golden"
PAGE = HERE / "imagenet256.md"


def recorded(system: str) -> dict[str, Any]:
    """The recorded recipe of a system; where none is recorded, the one that its spec states."""
    has_record = (GOLDEN / system / "recipe.json").is_file()
    return read_recorded(GOLDEN if has_record else HERE / "stated", system)


INTRODUCTION = """# ImageNet-256 recipes (not run here)

Written by `python docs/recipes/make_page.py`; a test says when it is stale. The YAML files under `configs/imagenet256/`
follow the papers and the official code. They are built at full size, on the meta device, by a test, and compared with
recordings of the official recipes number by number (`tests/recipes`); they were not trained here, so the results are
the papers'.

You need the images as class folders, those of training and of validation apart (every recipe trains on all 1,281,167),
and for the tokenizers torchvision's VGG-16 weights for LPIPS. Batch sizes in the YAML are per process and assume 8
processes; `batch` below is the whole.

```bash
torchrun --nproc_per_node 8 train.py --config configs/imagenet256/vq_16.yaml --name vq_16 \\
    --data.root IMAGENET/train --data.val_root IMAGENET/val \\
    --model.loss.perceptual.vgg VGG16.pth
torchrun --nproc_per_node 8 train.py --config configs/imagenet256/llamagen_b.yaml --name llamagen_b \\
    --data.root IMAGENET/train --data.val_root IMAGENET/val
```

## What the paper and its code say, and what ours does

Ours is the recorded recipe but for the last column. A dash: the sources state nothing.
"""

COMMON = """
## Differences of all recipes

- bf16 wherever the official code runs in fp16 with a loss scale; both keep weights in float32.
- Labels of samples are as many of each class (`--protocol adm-50k`); LlamaGen, Hita and ReToK draw them uniformly.
- LPIPS stays in eval mode; LlamaGen's tokenizer leaves a dropout of it on.
- Codes are computed as training goes on unless you make a cache (docs/training.md); views and crops are the same.
- The measured differences of forward passes, losses and gradients are those of `python convert.py verify`.
"""


def page() -> str:
    """The page in markdown."""
    entries = read_entries(HERE / "recipes.yaml")
    lines = [INTRODUCTION]
    lines.append(
        "| config | side | optimizer | schedule | batch, length | clip, average | images | ours differs in |"
    )
    lines.append("|---" * 8 + "|")
    for entry in entries:
        for side in entry.parts:
            lines.append(_row(entry, side))
    lines.append(COMMON)
    lines += _results(entries)
    return "\n".join(lines).rstrip() + "\n"


def _row(entry: Entry, side: str) -> str:
    part = recorded(entry.system)["parts"][entry.parts[side]]
    cells = [
        f"`{entry.config}`",
        f"{side} ({entry.system}/{entry.parts[side]})",
        _optimizer(part.get("optimizer") or {}),
        _schedule(part.get("schedule") or {}),
        _length(part),
        _average(part),
        _images(part.get("augmentation") or {}),
        _differences(entry, side, recorded_facts(part)),
    ]
    return "| " + " | ".join(cells) + " |"


def _said(*words: str) -> str:
    return ", ".join(word for word in words if word) or "-"


def _optimizer(facts: dict[str, Any]) -> str:
    if not facts:
        return "-"
    betas = facts.get("betas")  # a spec may not say them
    return _said(
        f"{facts['name']} {_number(facts['lr'])}",
        f"betas {betas[0]}, {betas[1]}" if betas else "",
        f"decay {_number(facts['weight_decay'])}",
    )


def _schedule(facts: dict[str, Any]) -> str:
    kind = facts.get("kind", "").replace("|", "/")
    warmup = facts.get("warmup_updates")
    return _said(kind, f"warm-up {warmup:,}" if warmup else "")


def _length(part: dict[str, Any]) -> str:
    batch, epochs = part.get("global_batch"), part.get("epochs")
    updates = (part.get("schedule") or {}).get("updates")
    return _said(
        f"{batch:,} images" if batch else "",
        f"{updates:,} updates" if updates else "",
        f"{epochs} epochs" if isinstance(epochs, (int, float)) else "",
    )


def _average(part: dict[str, Any]) -> str:
    clip, ema = part.get("grad_clip"), part.get("ema")
    average = f"average {ema['decay']}" if isinstance(ema, dict) and ema.get("decay") else ""
    if ema == "none":
        average = "no average"
    return _said("no clip" if clip == "none" else f"clip {clip}" if clip else "", average)


def _images(facts: dict[str, Any]) -> str:
    words = [
        str(facts[name])
        for name in ("resize", "crop", "pretokenization")
        if isinstance(facts.get(name), str)
    ]
    ten = facts.get("ten_crop")
    if ten is not None:
        words.append(ten if isinstance(ten, str) else f"ten crops of {ten['resize_crop']}")
    flip = facts.get("flip")
    if flip is not None:
        words.append(f"flip {flip}")
    return _said(*words).replace("|", "/")


def _differences(entry: Entry, side: str, recorded: Facts) -> str:
    """The meant differences, with the recorded value and ours where the YAML alone says it."""
    ours = facts_of(read_recipe(CONFIGS / f"{entry.config}.yaml"))
    found = {item.name: item for item in compare(recorded, ours)}
    lines = []
    for difference in read_differences(HERE / "differences.yaml"):
        if not difference.concerns(entry.config, side):
            continue
        names = [name for name in found if difference.covers(entry.config, side, name)]
        values = ""
        if side != "discriminator" and len(names) == 1 and found[names[0]].ours != "nothing":
            values = f" {found[names[0]].recorded}, ours {_number(found[names[0]].ours)}"
        lines.append(f"{difference.fact}{values}: {difference.reason}")
    return "; ".join(lines).replace("|", "/") or "nothing"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _results(entries: list[Entry]) -> list[str]:
    """Published samplings and reconstructions, by system in the order of the recipes."""
    lines = [
        "## Published results",
        "",
        "Samples, each with what its recording says of how they were drawn; `--config` of `sample.py` and of",
        "`evaluate.py model` takes the file, which lies in `configs/imagenet256/sampling/`:",
        "",
    ]
    lines += [
        "| system | variant | FID | IS | guidance | temperature, top-k, top-p | steps | file |",
        "|---" * 8 + "|",
    ]
    systems = list(dict.fromkeys(entry.system for entry in entries))
    for system in systems:
        for facts in recorded(system).get("sampling") or ():
            lines.append(_sampling(system, facts))
    lines += ["", "Reconstructions:", "", "| system | variant | rFID | PSNR |", "|---" * 4 + "|"]
    for system in systems:
        for facts in recorded(system).get("reconstruction") or ():
            cells = (system, facts.get("variant"), facts.get("rfid"), facts.get("psnr"))
            lines.append(
                "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"
            )
    return lines


@cache
def _files() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((HERE / "sampling.yaml").read_text())


def _file_of(system: str, facts: dict[str, Any]) -> str | None:
    """The file of sampling settings that holds a published variant's."""
    for name, entry in _files().items():
        if entry["system"] != system or entry.get("steps", facts.get("steps")) != facts.get(
            "steps"
        ):
            continue
        if any(fnmatchcase(facts["variant"], pattern) for pattern in entry["variants"]):
            return f"`{name}.yaml`"
    return None


def _sampling(system: str, facts: dict[str, Any]) -> str:
    power = facts.get("power")
    guidance = _said(
        str(facts["guidance"]) if facts.get("guidance") is not None else "scale not published",
        str(facts.get("guidance_schedule") or ""),
        f"power {power}" if power is not None else "",
    )
    draw = _said(
        *(
            f"{name} {facts[name]}"
            for name in ("temperature", "top_k", "top_p")
            if facts.get(name) is not None
        )
    )
    cells = (
        system,
        facts["variant"],
        facts.get("fid"),
        facts.get("inception_score"),
        guidance,
        draw,
        facts.get("steps"),
        _file_of(system, facts),
    )
    return (
        "| "
        + " | ".join("-" if cell is None else str(cell).replace("|", "/") for cell in cells)
        + " |"
    )


if __name__ == "__main__":
    PAGE.write_text(page())

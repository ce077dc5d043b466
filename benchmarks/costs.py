"""What each run under configs/ costs: the table of docs/cost.md, made from the YAMLs themselves.

    python benchmarks/costs.py --write docs/cost.md       (replaces what stands between its two marks)
    python benchmarks/costs.py --write docs/cost.md imagenet256/rar_b    (that row alone)

Every model is built at its real size on the meta device. Operations are counted on one image, forward and backward;
memory and GPU-hours are estimates by the formulas of the page. Only `MEASURED` was run.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import yaml

from tessellar.cli.train import TrainCLI, parse
from tessellar.errors import UserError
from tessellar.training.flops import CountFlops, peak_of
from tessellar.training.generator_module import GeneratorModule

ROOT = Path(__file__).resolve().parents[1] / "configs"
HEAD = (
    "| config | trained | frozen | tokens an image | GFLOP an image | memory without activations, GB "
    "| images in all | measured images/s | H100-hours, estimate |\n|---|---|---|---|---|---|---|---|---|"
)
MARKS = "<!-- made by benchmarks/costs.py -->", "<!-- end -->"
PROCESSES, GPU, SHARE = 8, "H100", 0.4  # what an estimate of GPU-hours supposes
MEASURED = {  # images/s, one thread of a shared CPU core, of the runs in the README
    "fashion_mnist/tokenizer": "199 to 221 (CPU core)",
    "fashion_mnist/generator": "104 to 129 (CPU core)",
}
NO_AUTOCAST = patch(
    "torch.autocast", lambda *_, **__: nullcontext()
)  # it does not know the meta device
#: By a generator's module, the tokenizer in place of an export that no YAML beside it trains.
STAND_INS = {
    "xar": "kl_vae.kl16",
    "mar": "kl_vae.kl16",
    "tokenbridge": "kl_vae.kl16",
    "bar": "bar_fsq.bar_fsq_256",
    "bitdance": "bitdance.ae_d16c32",
    "ibq": "ibq.ibq_16384",
    "open_magvit2": "open_magvit2.open_magvit2_256",
    "semanticist": "semanticist.semanticist_l",
    "tokenflow": "tokenflow.tokenflow_b_256",
}
IMPORTED = {  # tokenizers that a YAML reads as `imports/NAME`
    "maskgit_vqgan": {"class_path": "tessellar.tokenizers.maskgit_vqgan.maskgit_vqgan"},
    "var_vqvae_512": {
        "class_path": "tessellar.tokenizers.var.var_vqvae",
        "init_args": {"image_size": 512},
    },
    "vq_16_512": {
        "class_path": "tessellar.tokenizers.llamagen.vq_16",
        "init_args": {"image_size": 512},
    },
    "vq_16_2048": {
        "class_path": "tessellar.tokenizers.llamagen.vq_16",
        "init_args": {"image_size": 2048},
    },
}


class Cost(NamedTuple):
    """Facts of one config; None where an operation does not run on the meta device."""

    name: str
    trained: int
    frozen: int
    tokens: int
    flops: int | None
    images: int | None
    counted: bool = True

    @property
    def memory(self) -> float:
        """GB of weights, gradients, two moments of AdamW and averages in float32; activations come on top."""
        return (self.trained * 5 * 4 + self.frozen * 4) / 1e9

    @property
    def gpu_hours(self) -> float | None:
        peak = peak_of(GPU, "bf16-mixed")
        if self.flops is None or self.images is None or peak is None:
            return None
        return self.flops * self.images / (SHARE * peak) / 3600


def build(path: Path, folder: Path) -> TrainCLI:
    """The command line of a YAML on the meta device, without weights from files."""
    config = yaml.safe_load(path.read_text())
    arguments = config["model"]["init_args"]
    options = []
    if "generator" in arguments:
        generator = arguments["generator"]
        name = generator if isinstance(generator, str) else generator["class_path"]
        stand_in = STAND_INS.get(name.split(".")[-2], "llamagen.vq_16")
        given = arguments.get("tokenizer")
        if isinstance(given, str):
            found = _tokenizer_of(given, path) or f"tessellar.tokenizers.{stand_in}"
            options.append(
                f"--model.init_args.tokenizer={yaml.safe_dump(_class(found), default_flow_style=True)}"
            )
        elif isinstance(given, dict) and isinstance(given["init_args"].get("tokenizer"), str):
            inner = given["init_args"]["tokenizer"]  # TokenBridge's grid on another's latents
            given["init_args"]["tokenizer"] = _class(
                _tokenizer_of(inner, path) or f"tessellar.tokenizers.{stand_in}"
            )
    else:
        arguments["loss"]["init_args"].pop("perceptual", None)
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(config))
    fixed = ("--trainer.strategy", "auto", "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parse(["--config", str(copy), "--name", "x", *fixed, *options])


def _class(given: Any) -> Any:
    return given if isinstance(given, dict) else {"class_path": given}


def _tokenizer_of(export: str, path: Path) -> Any:
    """The tokenizer in the YAML beside this one that trains `runs/NAME/export`, or that is imported."""
    imported = IMPORTED.get(Path(export).name)
    if imported is not None:
        return imported
    beside = path.with_name(f"{Path(export).parent.name}.yaml")
    for candidate in (beside, path.with_name("tokenizer.yaml")):
        if candidate.exists() and candidate != path:
            return yaml.safe_load(candidate.read_text())["model"]["init_args"]["tokenizer"]
    return None


def cost(path: Path) -> Cost:
    """Build a config and count."""
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        try:
            cli = build(path, Path(folder))
        finally:
            os.chdir(here)
    module, config = cli.model, yaml.safe_load(path.read_text())
    trained = sum(p.numel() for player in module.make_players() for p in player.parameters)
    total = sum(p.numel() for p in module.parameters())
    several = config["trainer"].get("strategy", "auto") != "auto"
    batch = cli.datamodule.batch_size * module.accumulate * (PROCESSES if several else 1)
    steps = config["trainer"].get("max_steps")
    flops, counted = operations(module, module.tokenizer.image_size)
    return Cost(
        f"{path.parent.name}/{path.stem}",
        trained,
        total - trained,
        module.tokenizer.layout.length,
        flops,
        None if steps is None else steps * batch,
        counted,
    )


def operations(module: Any, size: tuple[int, int]) -> tuple[int | None, bool]:
    """Operations of one image (the frozen tokenizer forward, what is trained forward and backward),
    and whether they are those of training.

    A tokenizer that looks at values only while it trains (at its codes, at drawn lengths) is counted
    as it is used; a generator that looks at values is taken for 6 operations a parameter and token.
    """
    found = _counted(module, size)
    if found is not None:
        return found, True
    if isinstance(module, GeneratorModule):
        trained = sum(p.numel() for player in module.make_players() for p in player.parameters)
        return 6 * trained * module.tokenizer.layout.length, False
    module.eval()
    return _counted(module, size), False


def _counted(module: Any, size: tuple[int, int]) -> int | None:
    images = torch.zeros(1, 3, *size, device="meta")
    labels = torch.zeros(1, dtype=torch.long)
    try:
        with CountFlops() as count, NO_AUTOCAST:
            if isinstance(module, GeneratorModule):
                condition = module.model.conditioner({"label": labels}).to("meta")
                with torch.device("meta"):
                    terms = module.model.generator.loss(
                        module.tokens_of({"image": images}), condition
                    )
                    torch.stack(list(terms.values())).sum().backward()
            else:
                with torch.device("meta"):
                    module.tokenizer(images).reconstruction.sum().backward()
    except (RuntimeError, NotImplementedError, UserError):
        return None  # it looks at values, or at a vision model, which the meta device does not have
    return count.total


def row(c: Cost) -> str:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    hours = c.gpu_hours
    cells = [
        c.name,
        f"{c.trained:,}",
        f"{c.frozen:,}",
        str(c.tokens),
        ("" if c.counted else "~") * (c.flops is not None)
        + shown(c.flops and c.flops / 1e9, ",.4g"),
        f"{c.memory:.2f}",
        shown(c.images, ","),
        MEASURED.get(c.name, ""),
        "" if hours is None else "below 1" if hours < 1 else f"{hours:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def kept(page: str) -> dict[str, str]:
    """The rows between the marks of a page, by the config that each is of."""
    inside = page.partition(MARKS[0])[2].partition(MARKS[1])[0]
    rows = [
        line for line in inside.splitlines() if line.startswith("| ") and "/" in line.split()[1]
    ]
    return {line.split()[1]: line for line in rows}


def with_rows(page: str, rows: dict[str, str]) -> str:
    """The page with these rows, sorted, between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    text = "\n".join([HEAD, *(rows[name] for name in sorted(rows))])
    return f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"


def main() -> int:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description="The cost table of every config.")
    parser.add_argument(
        "configs",
        nargs="*",
        help="such as imagenet256/rar_b; the rows of others stay (default: all)",
    )
    parser.add_argument("--write", type=Path, help="a page to put the rows into, between its marks")
    given = parser.parse_args()
    known = {f"{path.parent.name}/{path.stem}": path for path in sorted(ROOT.glob("*/*.yaml"))}
    for name in given.configs or known:
        if name not in known:
            raise SystemExit(f"{name} is no config: there are {', '.join(known)}")
        made = row(cost(known[name]))
        print(made, flush=True)
        if given.write is not None:  # row by row: what is made stays, whatever comes
            page = given.write.read_text()
            rows = {key: line for key, line in kept(page).items() if key in known}
            given.write.write_text(with_rows(page, {**rows, name: made}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

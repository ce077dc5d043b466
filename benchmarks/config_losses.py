"""Losses of the first updates of every small run under configs/, to the bit: whether a refactor changed a computation.

    OMP_NUM_THREADS=1 python benchmarks/config_losses.py --fashion DIR --clipart DIR --out FILE [--weights FOLDER]
    OMP_NUM_THREADS=1 python benchmarks/config_losses.py --fashion DIR --clipart DIR --compare FILE [--start FOLDER]

Each config runs 3 updates of 8 samples at its own seed, in one thread. A generator reads the tokenizer of its config
with random weights; the teacher that some tokenizers learn from is a network with random weights too. Digests of the
weights before the first update tell another order of initial draws from another computation: `named` covers names and
values, `values` only the tensors, whatever their names. `--weights` keeps the initial weights and the state of chance
behind them (what is drawn in training goes on from there), `--start` begins from kept ones, of any version, a
generator's tokenizer included: its tokens are a function of its own start. bfloat16 is
computed where a processor only emulates it too. Equal bits can be expected on equal processors and versions of torch
only; the file names both.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import tessellar.cli.train
import tessellar.training.optim
from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.weights import with_current_names
from tessellar.cli.train import TrainCLI, parse
from tessellar.training.runs import commit

ROOT = Path(__file__).resolve().parents[1] / "configs"
FOLDERS = ("demo", "fashion_mnist", "openclipart64")
UPDATES, BATCH = 3, 8
TEACHER = "outputs/teachers/fmnist-vit.safetensors"
# The config that trains the tokenizer of a generator's run, by the name of the tokenizer's run.
TOKENIZERS = {
    "demo-tokenizer": "demo/tokenizer",
    "oca-tokenizer": "openclipart64/tokenizer",
    "restok(teacher=fmnist-vit)": "fashion_mnist/restok",
}
WITHOUT = ("Checkpoints", "Grids")  # callbacks that only write files


class Losses(L.Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.values.append(float(outputs["loss"]))


def data_options(folder: str, fashion: Path, clipart: Path) -> list[str]:
    options = [f"--data.init_args.batch_size={BATCH}"]
    if folder == "fashion_mnist":
        options.append(f"--data.init_args.root={fashion}")
    if folder == "openclipart64":
        options += [
            f"--data.init_args.shards={clipart}/train-*.tar",
            f"--data.init_args.val_shards={clipart}/val.tar",
        ]
    return options


def emulate_bfloat16() -> None:
    """Have runs keep the precision of their configs: elsewhere a processor without bfloat16
    arithmetic is given float32, and other bits.
    """
    for module in (tessellar.cli.train, tessellar.training.optim):
        module.computes_bfloat16 = lambda: True  # type: ignore[attr-defined]


def start_from(module: torch.nn.Module, name: str, start: Path | None) -> None:
    """Fill a config's model with the initial weights that were kept of it, where a folder is given,
    and go on from the state of chance that was kept with them.
    """
    if start is None:
        return
    state = load_file(start / f"{name.replace('/', '-')}.safetensors")
    module.load_state_dict(with_current_names(module, state))
    chance = start / f"{name.replace('/', '-')}-rng.safetensors"
    if chance.is_file():
        torch.set_rng_state(load_file(chance)["rng"])


def built(name: str, options: list[str]) -> TrainCLI:
    """The run of a config, with its model as its seed makes it."""
    trainer = [
        f"--trainer.max_steps={UPDATES}",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0",
    ]
    return parse(
        [
            "--config",
            str(ROOT / f"{name}.yaml"),
            "--name",
            name.replace("/", "-"),
            *trainer,
            *options,
        ]
    )


def tokenizer_option(name: str, options: list[str], start: Path | None) -> list[str]:
    """Names an export of the tokenizer that a generator's config reads; nothing for a tokenizer's config."""
    config = yaml.safe_load((ROOT / f"{name}.yaml").read_text(encoding="utf-8"))
    reads = config["model"]["init_args"]["tokenizer"]
    option = "--model.init_args.tokenizer"
    if not isinstance(reads, str):
        reads = reads["init_args"].get("tokenizer")
        option += ".init_args.tokenizer"
    if not isinstance(reads, str):
        return []
    run = Path(reads).parent.name
    source = TOKENIZERS.get(run, f"fashion_mnist/{run}")
    export = Path("tokenizers") / source
    if not export.exists():
        export.parent.mkdir(parents=True, exist_ok=True)
        module: Any = built(source, options).model
        start_from(module, source, start)
        export_tokenizer(module.tokenizer, export)
    return [f"{option}={export}"]


def make_teacher() -> None:
    """The network that configs name as a teacher, with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 3,
        "num_heads": 3,
    }
    network = timm.create_model("vit_tiny_patch16_224", **sizes)
    Path(TEACHER).parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), TEACHER)


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of a state dict: with its names, and of the values alone."""
    by_name = {}
    for name, tensor in state.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
        by_name[name] = digest.hexdigest()
    named = hashlib.sha256(json.dumps(by_name, sort_keys=True).encode())
    values = hashlib.sha256(json.dumps(sorted(by_name.values())).encode())
    return {"named": named.hexdigest(), "values": values.hexdigest()}


def measure(
    name: str, options: list[str], weights: Path | None, start: Path | None
) -> dict[str, Any]:
    """Losses of a config's first updates, exact, and digests of its weights before and after."""
    cli = built(name, [*options, *tokenizer_option(name, options, start)])
    module = cli.model
    trainer = cli.trainer
    losses = Losses()
    file = f"{name.replace('/', '-')}.safetensors"
    start_from(module, name, start)
    initial = digests(module.state_dict())
    if weights is not None:
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()},
            weights / file,
        )
        rng = f"{name.replace('/', '-')}-rng.safetensors"
        save_file({"rng": torch.get_rng_state()}, weights / rng)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kept = [callback for callback in callbacks if type(callback).__name__ not in WITHOUT]
    trainer.callbacks = [*kept, losses]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.fit(module, cli.datamodule)
    exact = [value.hex() for value in losses.values]
    return {"losses": exact, "initial": initial, "after": digests(module.state_dict())}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not equal, in words; empty where all bits are."""
    found = []
    for moment in ("initial", "after"):
        if ours[moment]["values"] != theirs[moment]["values"]:
            found.append(f"other weights ({moment})")
        elif ours[moment]["named"] != theirs[moment]["named"]:
            found.append(f"equal weights under other names ({moment})")
    for update, (mine, other) in enumerate(
        zip(ours["losses"], theirs["losses"], strict=True), start=1
    ):
        if mine != other:
            found.append(f"update {update}: {float.fromhex(mine)!r} for {float.fromhex(other)!r}")
    return found


def compare(found: dict[str, Any], file: Path) -> bool:
    """Print what differs from a file of before; whether all losses are equal."""
    before = json.loads(file.read_text(encoding="utf-8"))
    for fact in ("torch", "processor"):
        if found[fact] != before[fact]:
            print(f"other {fact}: {found[fact]} for {before[fact]}; bits may differ for that alone")
    equal = True
    for name, ours in found["configs"].items():
        theirs = before["configs"][name]
        said = differences(ours, theirs)
        print(f"{name}: {'; '.join(said) or 'equal'}")
        equal = equal and ours["losses"] == theirs["losses"]
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fashion", type=Path, required=True, help="folder of Fashion-MNIST's files"
    )
    parser.add_argument(
        "--clipart", type=Path, required=True, help="folder of train-*.tar and val.tar"
    )
    parser.add_argument("--only", nargs="*", help="configs such as demo/tokenizer (default: all)")
    parser.add_argument("--out", type=Path, help="write what was found, as JSON")
    parser.add_argument(
        "--compare", type=Path, help="a file of before; exit code 1 where a loss differs"
    )
    parser.add_argument(
        "--weights", type=Path, help="folder for the initial weights of every config"
    )
    parser.add_argument("--start", type=Path, help="folder of initial weights to begin from")
    options = parser.parse_args()
    paths = {name: path.resolve() for name, path in vars(options).items() if isinstance(path, Path)}
    if "weights" in paths:
        paths["weights"].mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)
    emulate_bfloat16()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    names = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).glob("*.yaml")):
            # An alignment begins from an export, not from a seed.
            if "source" not in yaml.safe_load(file.read_text())["model"]["init_args"]:
                names.append(f"{folder}/{file.stem}")
    found: dict[str, Any] = {
        "commit": commit(),
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "updates": UPDATES,
        "batch": BATCH,
        "configs": {},
    }
    sys.argv = sys.argv[
        :1
    ]  # jsonargparse warns where it is given arguments and the command line has others
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_teacher()
        for name in options.only or names:
            given = data_options(name.split("/")[0], paths["fashion"], paths["clipart"])
            found["configs"][name] = measure(name, given, paths.get("weights"), paths.get("start"))
            print(
                name,
                *(float.fromhex(loss) for loss in found["configs"][name]["losses"]),
                flush=True,
            )
        os.chdir(Path(__file__).parent)
    if "out" in paths:
        paths["out"].parent.mkdir(parents=True, exist_ok=True)
        paths["out"].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if "compare" not in paths or compare(found, paths["compare"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())

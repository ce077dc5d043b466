"""What a GPU makes of tessellar: training and sampling rates, MFU, memory, and whether its kernels agree with the CPU.

    benchmarks/gpu.sh [--out FOLDER] [--minutes 8] [--only NAME ...] [--tiny]

Each part is a process of its own with a share of the time: what fails or takes too long is named, and the others go on.
Weights and data are random: rates are those of compute, without a loader. Parts that a version of torch or the machine
cannot do say so. `--tiny` runs everything at toy sizes on any device (a test does, on a CPU): its numbers mean nothing.
Training steps are of bfloat16 autocast with AdamW (fused on a GPU); MFU counts the operations that torch's formulas see
against the GPU's dense bfloat16 peak. Gradients are not clipped, averages not kept.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- what need not be installed
OPTIONAL = ("yaml", "PIL", "timm", "jsonargparse", "torchvision", "lightning", "tqdm", "scipy")


class AnyName(type):
    """A class whose attributes are such classes: it stands for what is named and never called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of OPTIONAL that are not installed, with nothing in them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(AnyName(spec.name, (), {}), name)  # type: ignore[method-assign]
        module.__path__ = []  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_for_absent(pretend: bool = False) -> list[str]:
    """Let tessellar's models be imported without the packages that they do not need to run; `pretend`: as if none
    were installed.
    """
    absent = tuple(n for n in OPTIONAL if pretend or importlib.util.find_spec(n) is None)
    sys.meta_path.insert(0, Absent(absent))
    if "timm" in absent:
        mlp = importlib.import_module("timm.layers.mlp")
        mlp.Mlp = plain_mlp  # type: ignore[attr-defined]  # VAR's one use of timm
    return list(absent)


def plain_mlp(width: int, hidden: int, act_layer: Callable[[], Any]) -> Any:
    """timm's Mlp: its names, its order."""
    from collections import OrderedDict

    from torch import nn

    layers = {"fc1": nn.Linear(width, hidden), "act": act_layer(), "fc2": nn.Linear(hidden, width)}
    return nn.Sequential(OrderedDict(layers))


# ---------------------------------------------------------------- how things are measured
class Size:
    """Real sizes, or toy ones."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.steps = 2 if tiny else 10
        self.warm = 1 if tiny else 3

    def of(self, real: Any, toy: Any) -> Any:
        return toy if self.tiny else real


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], times: int, warm: int) -> float:
    """Seconds of one call: the mean of `times` after `warm`."""
    for _ in range(warm):
        run()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - started) / times


def peak_gb() -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def training(
    module: Any, loss: Callable[[], Any], images: int, size: Size, compile: bool = False
) -> dict[str, Any]:
    """images/s, MFU and memory of a training step."""
    import torch

    from tessellar.training.flops import CountFlops, peak
    from tessellar.training.optim import OptimizerSettings

    module.train()
    optimizers = OptimizerSettings(lr=1e-4).make(module)
    kind = device().type

    def step(of: Callable[[], Any] = loss) -> None:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            total = of()
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    with CountFlops() as count:
        total = loss()
        total.backward()
    for optimizer in optimizers:
        optimizer.zero_grad()
    of = torch.compile(loss) if compile else loss
    seconds = seconds_of(lambda: step(of), size.steps, size.warm)
    most = peak(device(), "bf16-mixed")
    return {
        "images_per_second": images / seconds,
        "ms_a_step": 1e3 * seconds,
        "batch": images,
        "mfu": None if most is None else count.total / seconds / most,
        "peak_gb": peak_gb(),
    }


def llama(name: str, size: Size) -> tuple[Any, Any, Any]:
    """A LlamaGen, tokens of a synthetic cache and conditions."""
    import torch

    from tessellar.models import llamagen
    from tessellar.protocol.condition import Condition
    from tessellar.protocol.layout import Categorical, grid_layout

    layout = grid_layout(size.of(16, 4), size.of(16, 4), Categorical(size.of(16_384, 64)))
    if size.tiny:
        model = llamagen.LlamaGen(layout, 32, 2, 4, num_classes=10)
    else:
        model = getattr(llamagen, f"llamagen_{name}")(layout)
    batch = size.of({"b": 64, "l": 32}[name], 2)
    tokens = torch.randint(0, size.of(16_384, 64), (batch, layout.length), device=device())
    labels = Condition(ids=torch.randint(0, 10, (batch,), device=device()))
    return model.to(device()), tokens, labels


# ---------------------------------------------------------------- the parts
def train_llamagen(name: str, compile: bool) -> Callable[[Size], dict[str, Any]]:
    def part(size: Size) -> dict[str, Any]:
        model, tokens, labels = llama(name, size)
        if compile and not size.tiny:
            for block in model.layers:
                block.compile()

        def loss() -> Any:
            return model.loss(tokens, labels)["cross_entropy"]

        return training(model, loss, len(tokens), size)

    return part


def train_generator(make: Callable[[Size], tuple[Any, Any]]) -> Callable[[Size], dict[str, Any]]:
    """A generator and its tokens [B, N, ...], trained with classes."""

    def part(size: Size) -> dict[str, Any]:
        import torch

        from tessellar.protocol.condition import Condition

        model, tokens = make(size)
        model = model.to(device())
        tokens = tokens.to(device())
        labels = Condition(ids=torch.randint(0, 10, (len(tokens),), device=device()))

        def loss() -> Any:
            return torch.stack(list(model.loss(tokens, labels).values())).sum()

        return training(model, loss, len(tokens), size)

    return part


def xar_b(size: Size) -> tuple[Any, Any]:
    import torch

    from tessellar.models import xar
    from tessellar.protocol.layout import Continuous, grid_layout

    layout = grid_layout(size.of(16, 4), size.of(16, 4), Continuous(16))
    toy = size.tiny
    model = xar.XAR(layout, "cell:2x2", 32, 2, 4, num_classes=10) if toy else xar.xar_b(layout)
    return model, torch.randn(size.of(32, 2), layout.length, 16)


def var_d16(size: Size) -> tuple[Any, Any]:
    import torch

    from tessellar.models import var
    from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer, var_vqvae

    if size.tiny:
        quantizer = MultiScaleQuantizer(16, 4, (1, 2, 4))
        tokenizer = VARVQVAE(quantizer, 16, 32, (1, 1, 1), 1)
        model = var.VAR(tokenizer.layout, 32, 2, 4, 10, 4)
    else:
        tokenizer = var_vqvae(256)
        model = var.var_d16(tokenizer.layout)
    model.bind(tokenizer)
    codes = size.of(4096, 16)
    return model, torch.randint(0, codes, (size.of(32, 1), tokenizer.layout.length))


def token_shuffle_b(size: Size) -> tuple[Any, Any]:
    import torch

    from tessellar.models import token_shuffle
    from tessellar.protocol.layout import Categorical, grid_layout

    layout = grid_layout(size.of(32, 4), size.of(32, 4), Categorical(size.of(16_384, 64)))
    if size.tiny:
        model = token_shuffle.TokenShuffle(layout, 32, 2, 4, 2, num_classes=10)
    else:
        model = token_shuffle.token_shuffle_b(layout)
    return model, torch.randint(0, size.of(16_384, 64), (size.of(32, 2), layout.length))


def train_tokenizer(make: Callable[[Size], tuple[Any, int]]) -> Callable[[Size], dict[str, Any]]:
    """A tokenizer with a loss of pixels and its own auxiliary terms."""

    def part(size: Size) -> dict[str, Any]:
        import torch

        model, batch = make(size)
        model = model.to(device())
        images = 2 * torch.rand(batch, 3, *model.image_size, device=device()) - 1

        def loss() -> Any:
            output = model(images)
            pixels = (output.reconstruction.float() - images).square().mean()
            return pixels + sum(output.losses.values())

        return training(model, loss, batch, size)

    return part


def vq_16(size: Size) -> tuple[Any, int]:
    from tessellar.tokenizers.llamagen import LlamaGenVQ
    from tessellar.tokenizers.llamagen import vq_16 as published
    from tessellar.tokenizers.quantizers.vq import VectorQuantizer

    if size.tiny:
        return LlamaGenVQ(VectorQuantizer(64, 8), 16, 32, (1, 1), 1, 32), 1
    return published(image_size=256), 16


def titok_b64(size: Size) -> tuple[Any, int]:
    from tessellar.tokenizers.quantizers.vq import VectorQuantizer
    from tessellar.tokenizers.titok import TiTok, ViTSize, titok_bl64_vq8k

    if size.tiny:
        toy = ViTSize(32, 2, 2)
        return TiTok(VectorQuantizer(64, 8), 32, 8, 4, toy, toy), 1
    return titok_bl64_vq8k(), 32


def sample_llamagen(batch: int, how: str) -> Callable[[Size], dict[str, Any]]:
    """Ancestral sampling with guidance, top-k 2,000: plain, with compiled blocks, or a captured step."""

    def part(size: Size) -> dict[str, Any]:
        import torch

        from tessellar.protocol.choice import Choice
        from tessellar.protocol.condition import Condition
        from tessellar.protocol.guidance import Constant
        from tessellar.sampling.decode import Ancestral
        from tessellar.sampling.prepare import prepared
        from tessellar.sampling.settings import Sampling

        model, _, _ = llama("b", size)
        model = model.eval()
        if device().type == "cuda":
            model = model.bfloat16()
        count = size.of(batch, 1)
        labels = Condition(ids=torch.arange(count) % 10)
        sampling = Sampling(
            guidance=Constant(2.0),
            choice=Choice(top_k=size.of(2000, 16)),
            algorithm=Ancestral(compile=how == "captured" and not size.tiny),
        )

        def run() -> None:
            sampling.tokens(model, labels, range(count))

        with torch.inference_mode(), prepared(model, compile=how == "compiled" and not size.tiny):
            seconds = seconds_of(run, 1, 1)
        return {"images_per_second": count / seconds, "batch": count, "peak_gb": peak_gb()}

    return part


def sample_speculative(name: str) -> Callable[[Size], dict[str, Any]]:
    def part(size: Size) -> dict[str, Any]:
        import torch

        from tessellar.protocol.choice import Choice
        from tessellar.protocol.condition import Condition
        from tessellar.protocol.guidance import Constant
        from tessellar.sampling.prepare import prepared
        from tessellar.sampling.report import Recorder
        from tessellar.sampling.settings import Sampling
        from tessellar.sampling.speculative import GroupedJacobi, SpeculativeJacobi

        model, _, _ = llama("b", size)
        model = model.eval()
        if device().type == "cuda":
            model = model.bfloat16()
        algorithm = {"sjd": SpeculativeJacobi, "gsd": GroupedJacobi}[name](window=size.of(16, 2))
        choice = Choice(top_k=size.of(2000, 16))
        sampling = Sampling(guidance=Constant(2.0), choice=choice, algorithm=algorithm)
        labels = Condition(ids=torch.zeros(1, dtype=torch.int64))
        recorder = Recorder()
        with torch.inference_mode(), prepared(model):
            seconds = seconds_of(lambda: sampling.tokens(model, labels, [0], recorder), 1, 1)
        report = recorder.report()
        return {
            "images_per_second": 1 / seconds,
            "evaluations_per_image": report.evaluations_per_image,
            "network_share": report.network_seconds / report.seconds,
        }

    return part


def sample_har(size: Size) -> dict[str, Any]:
    import torch

    from tessellar.models import har
    from tessellar.protocol.condition import Condition
    from tessellar.protocol.guidance import Constant
    from tessellar.protocol.layout import Categorical, sequence_layout
    from tessellar.sampling.prepare import prepared
    from tessellar.sampling.settings import Sampling

    layout = sequence_layout(size.of(128, 8), Categorical(size.of(8192, 64)))
    model = har.HAR(layout, 32, 2, 4, num_classes=10) if size.tiny else har.har_b(layout)
    model = model.to(device()).eval()
    count = size.of(64, 1)
    labels = Condition(ids=torch.arange(count) % 10)
    sampling = Sampling(guidance=Constant(2.0))
    with torch.inference_mode(), prepared(model):
        seconds = seconds_of(lambda: sampling.tokens(model, labels, range(count)), 1, 1)
    return {"images_per_second": count / seconds, "batch": count, "peak_gb": peak_gb()}


def fid_engine(size: Size) -> dict[str, Any]:
    """Moments of features as they stream by, and the distance of two sets of them."""
    import torch

    from tessellar.measures.frechet import frechet_distance
    from tessellar.measures.statistics import FeatureStatistics

    dim, count = size.of((2048, 50_000), (16, 64))
    drawn = torch.Generator(device()).manual_seed(0)
    made = []
    started = time.perf_counter()
    for _ in range(2):
        statistics = FeatureStatistics(dim, device())
        for start in range(0, count, 500):
            rows = min(500, count - start)
            statistics.update(torch.randn(rows, dim, device=device(), generator=drawn))
        made.append(statistics.moments())
    wait()
    streamed = time.perf_counter()
    distance = frechet_distance(*made)
    wait()
    return {
        "features_per_second": 2 * count / (streamed - started),
        "distance_seconds": time.perf_counter() - streamed,
        "distance": distance,
    }


def inception(size: Size) -> dict[str, Any]:
    """torch-fidelity's network with random weights, where it is installed."""
    from unittest.mock import patch

    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    with patch("torch.load", lambda *_, **__: {}), patch.object(Network, "load_state_dict"):
        network = Network("inception", ["2048"], feature_extractor_weights_path=__file__)
    network = network.to(device()).to(memory_format=torch.channels_last)
    batch = size.of(128, 1)
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=device())
    with torch.inference_mode():
        seconds = seconds_of(lambda: network(images), size.steps, size.warm)
    return {"images_per_second": batch / seconds, "peak_gb": peak_gb()}


def agrees(size: Size) -> dict[str, Any]:
    """float32 on this device against float32 on the CPU: logits and loss of LlamaGen, codes of a quantizer, noise,
    greedy tokens; TF32 is off here. Tolerances stand beside what was found.
    """
    import torch

    from tessellar.models.llamagen import LlamaGen
    from tessellar.protocol.choice import Choice
    from tessellar.protocol.condition import Condition
    from tessellar.protocol.distribution import Logits
    from tessellar.protocol.guidance import Constant
    from tessellar.protocol.layout import Categorical, grid_layout
    from tessellar.protocol.noise import Noise
    from tessellar.sampling.settings import Sampling
    from tessellar.tokenizers.quantizers.vq import VectorQuantizer

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    layout = grid_layout(8, 8, Categorical(512))
    model = LlamaGen(layout, 128, 4, 4, num_classes=10).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    tokens = torch.randint(0, 512, (4, 64))
    labels = Condition(ids=torch.arange(4))
    greedy = Sampling(guidance=Constant(2.0), choice=Choice(temperature=0))
    quantizer = VectorQuantizer(512, 16).eval()
    vectors = torch.randn(4, 64, 16)
    found = {}
    for where in (torch.device("cpu"), device()):
        model = model.to(where)
        quantizer = quantizer.to(where)
        with torch.no_grad():
            scores = model.score(tokens.to(where), labels.to(where))
            assert isinstance(scores, Logits)
            logits = scores.logits
            loss = model.loss(tokens.to(where), labels.to(where))["cross_entropy"]
            codes = quantizer.encode(vectors.to(where))
            drawn = greedy.tokens(model, labels, [0, 1, 2, 3])
        noise = Noise([1, 2], where)
        found[where.type] = {
            "logits": logits.cpu(),
            "loss": loss.cpu(),
            "codes": codes.cpu(),
            "tokens": drawn.cpu(),
            "uniform": noise.uniform(1000).cpu(),
            "normal": noise.normal(1000).cpu(),
        }
    ours = found[device().type]
    cpu = found["cpu"]
    scale = float(cpu["logits"].abs().max())
    result = {
        "logits_relative": float((ours["logits"] - cpu["logits"]).abs().max()) / scale,
        "logits_tolerance": 2e-5,
        "loss_difference": abs(float(ours["loss"] - cpu["loss"])),
        "loss_tolerance": 2e-5,
        "codes_agree": float((ours["codes"] == cpu["codes"]).float().mean()),
        "greedy_tokens_agree": float((ours["tokens"] == cpu["tokens"]).float().mean()),
        "uniform_equal": bool(torch.equal(ours["uniform"], cpu["uniform"])),
        "normal_difference": float((ours["normal"] - cpu["normal"]).abs().max()),
    }
    ok = (
        result["logits_relative"] <= result["logits_tolerance"]
        and result["loss_difference"] <= result["loss_tolerance"]
        and result["codes_agree"] > 0.999
        and result["greedy_tokens_agree"] > 0.98
        and result["uniform_equal"]
        and result["normal_difference"] <= 1e-6
    )
    return {"agrees": ok, **result}


def captured_agrees(size: Size) -> dict[str, Any]:
    """Tokens of the captured step against those of the plain loop, on this device, at temperature 0."""
    import torch

    from tessellar.models.llamagen import LlamaGen
    from tessellar.protocol.choice import Choice
    from tessellar.protocol.condition import Condition
    from tessellar.protocol.guidance import Constant
    from tessellar.protocol.layout import Categorical, grid_layout
    from tessellar.sampling import captured
    from tessellar.sampling.decode import Ancestral
    from tessellar.sampling.settings import Sampling

    if device().type == "cpu":
        captured.BACKEND = "aot_eager"
    torch.manual_seed(0)
    side = size.of(16, 2)
    layout = grid_layout(side, side, Categorical(512))
    model = LlamaGen(layout, 128, size.of(4, 1), 4, num_classes=10).eval().to(device())
    torch.nn.init.normal_(model.output.weight, std=0.3)
    labels = Condition(ids=torch.arange(4))
    tokens = [
        Sampling(Constant(2.0), Choice(temperature=0), Ancestral(compile=compile)).tokens(
            model, labels, [0, 1, 2, 3]
        )
        for compile in (False, True)
    ]
    share = float((tokens[0] == tokens[1]).float().mean())
    return {"agrees": share > 0.98, "tokens_agree": share}


def nccl(size: Size) -> dict[str, Any]:
    """One rank: a group is made, and a sum of it is what went in."""
    import torch

    backend = "nccl" if device().type == "cuda" else "gloo"
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group(backend)
    values = torch.arange(1000.0, device=device())
    torch.distributed.all_reduce(values)
    torch.distributed.destroy_process_group()
    return {"agrees": bool((values.cpu() == torch.arange(1000.0)).all()), "backend": backend}


PARTS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "kernels against the CPU": agrees,
    "captured step against the loop": captured_agrees,
    "nccl, one rank": nccl,
    "train llamagen_b": train_llamagen("b", False),
    "train llamagen_b, compiled blocks": train_llamagen("b", True),
    "train llamagen_l": train_llamagen("l", False),
    "train llamagen_l, compiled blocks": train_llamagen("l", True),
    "train xar_b": train_generator(xar_b),
    "train var_d16": train_generator(var_d16),
    "train token_shuffle_b": train_generator(token_shuffle_b),
    "train vq_16": train_tokenizer(vq_16),
    "train titok_bl64": train_tokenizer(titok_b64),
    "sample llamagen_b, 1": sample_llamagen(1, "plain"),
    "sample llamagen_b, 64": sample_llamagen(64, "plain"),
    "sample llamagen_b, 256": sample_llamagen(256, "plain"),
    "sample llamagen_b, 64, compiled blocks": sample_llamagen(64, "compiled"),
    "sample llamagen_b, 1, captured": sample_llamagen(1, "captured"),
    "sample llamagen_b, 64, captured": sample_llamagen(64, "captured"),
    "sample llamagen_b, 256, captured": sample_llamagen(256, "captured"),
    "sample sjd, 1": sample_speculative("sjd"),
    "sample gsd, 1": sample_speculative("gsd"),
    "sample har_b, 64": sample_har,
    "fid engine": fid_engine,
    "inception": inception,
}


# ---------------------------------------------------------------- one part, all parts
def run_part(name: str, tiny: bool, pretend: bool) -> None:
    absent = stand_in_for_absent(pretend)
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    found = PARTS[name](Size(tiny))
    print("FOUND " + json.dumps({**found, "absent": absent}))


def facts() -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


@contextmanager
def told(name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Each part in a process, as long as there is time; what failed says why."""
    ends = time.perf_counter() + 60 * given.minutes
    names = [name for name in PARTS if not given.only or any(o in name for o in given.only)]
    results: dict[str, Any] = {}
    for place, name in enumerate(names):
        left = ends - time.perf_counter()
        if left <= 0:
            results[name] = {"failed": "no time was left"}
            continue
        # A part may take three times its even share of what is left.
        limit = max(min(left, 3 * left / (len(names) - place)), min(left, 20))
        command = [sys.executable, __file__, "--part", name]
        command += ["--tiny"] * given.tiny + ["--pretend"] * given.pretend
        with told(name):
            try:
                ended = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            except subprocess.TimeoutExpired:
                results[name] = {"failed": f"took longer than {limit:.0f} s"}
                continue
        found = [x[6:] for x in ended.stdout.splitlines() if x.startswith("FOUND ")]
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        results[name] = json.loads(found[0]) if found else {"failed": last[:300]}
    return results


def table(machine: dict[str, Any], results: dict[str, Any]) -> str:
    """Markdown, for docs/cost.md."""
    lines = [
        f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}:",
        "",
        "| what | images/s | batch | MFU | peak GB | else |",
        "|---|---|---|---|---|---|",
    ]
    shown = ("images_per_second", "batch", "mfu", "peak_gb")
    for name, found in results.items():
        cells = []
        for key in shown:
            value = found.get(key)
            cells.append("" if value is None else f"{value:.4g}")
        rest = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found.items()
            if key not in (*shown, "absent", "ms_a_step")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(rest)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="What a GPU makes of tessellar.")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--only", nargs="*", default=[], help="parts whose names hold one of these")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any device")
    parser.add_argument(
        "--pretend", action="store_true", help="as if no optional package were there"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        run_part(given.part, given.tiny, given.pretend)
        return 0
    machine = facts()
    results = run_all(given)
    given.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "tiny": given.tiny, "parts": results}, indent=1)
    (given.out / "gpu.json").write_text(text + "\n")
    (given.out / "gpu.md").write_text(table(machine, results))
    print(table(machine, results))
    failed = [name for name, found in results.items() if "failed" in found]
    disagree = [name for name, found in results.items() if found.get("agrees") is False]
    for name in failed:
        print(f"failed: {name}: {results[name]['failed']}")
    for name in disagree:
        print(f"does not agree: {name}")
    return 1 if disagree else 0


if __name__ == "__main__":
    sys.exit(main())

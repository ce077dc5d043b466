"""Our evaluation against torch-fidelity's code and scipy's matrix square root, as ratios of times (above 1: ours wins).

    python -m benchmarks.evaluation [--images 48] [--features 4096] [--rounds 3] [--weights FILE] [--json FILE]
    python -m benchmarks.evaluation --command 2000 --several 500

InceptionV3 with random weights unless a file is given. Network, statistics, distance at D = 2048, and the way from
pixels to FID; rounds are interleaved and the fastest counts, in CPU seconds if torch runs one thread (a busy machine
then changes little), else in seconds. `--command N`: the whole command on a folder of N pictures and one of N / 10 (64
at least), against torch-fidelity's; both run in turns of two seconds, in CPU seconds. `--several N`: `evaluate.py
model` with six small networks in one pass, against six runs, and the same on a folder. Numbers belong to the machine
that made them.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from benchmarks.alternation import alternate
from tessellar.checkpoints.export import export_generator
from tessellar.cli import evaluate
from tessellar.evaluation.collect import Needs, collect
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import network_of
from tessellar.evaluation.record import read_record
from tessellar.evaluation.sources import ImageBatch
from tessellar.measures.frechet import frechet_distance
from tessellar.measures.statistics import FeatureStatistics, Moments
from tessellar.models.llamagen import LlamaGen
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.sampling.output import save_png
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

DIM, BATCH = 2048, 16
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
Row = dict[str, Any]


def random_weights(path: Path) -> Path:
    """A weights file of torch-fidelity's Inception with random values of the right scale."""
    with (
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
        mock.patch("torch.load"),
    ):
        with torch.device("meta"):
            network = FeatureExtractorInceptionV3(
                "random", ["2048"], feature_extractor_weights_path="none"
            )
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1
        state[name] = (scale * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.ones(tensor.shape)
    torch.save(state, path)
    return path


def race(
    name: str, ours: Callable[[], float], theirs: Callable[[], float], rounds: int, other: str
) -> Row:
    """Both, interleaved; their fastest times and the last values."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    values = {}
    for _ in range(rounds):
        for who, run in (("ours", ours), ("theirs", theirs)):
            start = CLOCK()
            values[who] = run()
            times[who].append(CLOCK() - start)
    fastest = {who: min(seconds) for who, seconds in times.items()}
    return row_of(name, other, fastest, values)


def row_of(name: str, other: str, times: dict[str, float], values: dict[str, float]) -> Row:
    """A row of times and values of "ours" and "theirs", printed."""
    difference = abs(values["ours"] - values["theirs"]) / max(abs(values["theirs"]), 1e-12)
    row = {
        "what": name,
        "against": other,
        **times,
        "ratio": times["theirs"] / times["ours"],
        "difference": difference,
    }
    print(
        f"{name:<34} {other:<15} {times['ours']:8.3f} {times['theirs']:9.3f} {row['ratio']:7.2f}  {difference:.1e}",
        flush=True,
    )
    return row


def their_features(network: FeatureExtractorInceptionV3, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(part)[0] for part in images.split(BATCH)])


def our_features(extractor: Extractor, images: Tensor) -> Tensor:
    return torch.cat([extractor(part).features for part in images.split(BATCH)])


def our_moments(extractor: Extractor, images: Tensor) -> Moments:
    batches = [ImageBatch(images, torch.arange(len(images)))]
    return collect(batches, len(images), extractor, Needs(), BATCH).moments


def streamed(features: Tensor) -> Moments:
    statistics = FeatureStatistics(DIM)
    for part in features.split(64):
        statistics.update(part)
    return statistics.moments()


def sqrtm_distance(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy())
    traces = a.cov.trace() + b.cov.trace() - 2 * np.trace(root).real
    return float((a.mean - b.mean).square().sum() + traces)


def eigvals_distance(a: Moments, b: Moments) -> float:
    pair = [{"mu": m.mean.numpy(), "sigma": m.cov.numpy()} for m in (a, b)]
    return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]


def fresh(moments: Moments) -> Moments:
    """The same statistics without what an earlier distance has computed of them."""
    return Moments(moments.mean, moments.cov, moments.count)


def network_rows(images: Tensor, weights: Path, rounds: int) -> list[Row]:
    """Network alone, then pixels to FID, against torch-fidelity."""
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    ours = load_extractor(weights)
    halves = images.chunk(2)

    def our_fid() -> float:
        return frechet_distance(*(our_moments(ours, half) for half in halves))

    def their_fid() -> float:
        stats = [fid_features_to_statistics(their_features(theirs, half)) for half in halves]
        return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]

    network = race(
        f"network, {len(images)} images of 64 px",
        lambda: float(our_features(ours, images).mean()),
        lambda: float(their_features(theirs, images).mean()),
        rounds,
        "torch-fidelity",
    )
    print(f"{'':<34} {len(images) / network['ours']:.1f} images/s")
    return [network, race("pixels to FID", our_fid, their_fid, rounds, "torch-fidelity")]


def feature_rows(count: int, rounds: int) -> list[Row]:
    """Statistics of `count` features and the distance between two sets of them."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIM, DIM, generator=draw) * torch.logspace(0, -2, DIM)
    sets = [torch.randn(count, DIM, generator=draw) @ mixing / 30 + shift for shift in (0.0, 0.05)]
    statistics = race(
        f"statistics of {count} features",
        lambda: float(streamed(sets[0]).cov.trace()),
        lambda: float(np.trace(fid_features_to_statistics(sets[0])["sigma"])),
        rounds,
        "torch-fidelity",
    )
    a, b = (streamed(features) for features in sets)
    ours = lambda: frechet_distance(fresh(a), fresh(b))  # noqa: E731
    rows = [
        statistics,
        race("distance, D = 2048", ours, lambda: eigvals_distance(a, b), rounds, "torch-fidelity"),
    ]
    rows.append(race("distance, D = 2048", ours, lambda: sqrtm_distance(a, b), 1, "scipy sqrtm"))
    frechet_distance(a, b)
    known = race(
        "distance, reference seen before",
        lambda: frechet_distance(a, b),
        ours,
        rounds,
        "ours, unseen",
    )
    return [*rows, known]


def write_pictures(count: int, folder: Path, seed: int, size: int = 64) -> Path:
    """PNG files of blurry noise."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    for i in range(count):
        noise = torch.rand(1, 3, 8, 8, generator=draw)
        picture = torch.nn.functional.interpolate(noise, (size, size), mode="bilinear")[0]
        save_png((255 * picture).to(torch.uint8), folder / f"{i:06d}.png")
    return folder


def command_row(count: int, weights: Path, folder: Path) -> Row:
    """FID and IS of a folder of `count` pictures against one of a tenth, at least 64: `evaluate.py samples` and
    torch-fidelity's command, side by side, start and decoding included.
    """
    samples = write_pictures(count, folder / "samples", seed=1)
    reference = write_pictures(max(64, count // 10), folder / "reference", seed=2)
    out = folder / "record.json"
    ours = [sys.executable, "evaluate.py", "samples", str(samples), "--reference", str(reference)]
    ours += ["--cache", str(folder / "c"), "--extractor", str(weights), "--metrics", "fd", "is"]
    ours += ["--out", str(out), "--device", "cpu"]
    theirs = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(samples)]
    theirs += ["--input2", str(reference), "--fid", "--isc", "--cpu", "--no-cache", "--json"]
    theirs += ["--silent", "--batch-size", "64", "--feature-extractor-weights-path", str(weights)]
    ended = alternate({"ours": ours, "theirs": theirs})
    printed = ended["theirs"].output
    values = {
        "ours": next(iter(read_record(out)["metrics"].values())),
        "theirs": json.loads(printed[printed.index("{") :])["frechet_inception_distance"],
    }
    times = {who: one.cpu_seconds for who, one in ended.items()}
    return row_of(f"the command, {count} pictures", "torch-fidelity", times, values)


def several_rows(count: int, folder: Path, rounds: int) -> list[Row]:
    """Six small networks in one pass against six runs: of a generator, and of a folder. Runs are
    calls of one process: what starting six processes costs is not counted.
    """
    networks = []
    for number in range(6):
        torch.manual_seed(number)
        facts = NetworkFacts(f"net{number}", "test_resnet", 0, (32, 32), resize="torch-bicubic")
        path = folder / f"net{number}.safetensors"
        save_file(network_of(facts).state_dict(), path, metadata=facts.to_metadata())
        networks.append(str(path))
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(256, 8), 32, 4, 64, 2, 2, 4)
    generator = LlamaGen(tokenizer.layout, 256, 6, 8, num_classes=10)
    export = folder / "export"
    export_generator(ImageGenerator(tokenizer, generator, ClassConditioner(10)), export)
    reference = write_pictures(500, folder / "train", seed=3, size=32)
    pictures = write_pictures(count, folder / "made", seed=4, size=32)
    shared = ["--reference", str(reference), "--device", "cpu", "--cache", str(folder / "kept")]

    def run(words: list[str], names: list[str]) -> dict[str, float]:
        out = folder / "several.json"
        evaluate.main(
            [*words, *shared, "--extractor", *names, "--metrics", "fd", "--out", str(out)]
        )
        return read_record(out)["metrics"]

    rows = []
    for what, words in (
        (f"six networks, {count} samples", ["model", str(export), "--count", str(count)]),
        (f"six networks, {count} pictures", ["samples", str(pictures)]),
    ):
        run(words, networks)  # references are in the cache then, as for later runs

        def together(words: list[str] = words) -> float:
            return sum(run(words, networks).values())

        def apart(words: list[str] = words) -> float:
            return sum(value for name in networks for value in run(words, [name]).values())

        rows.append(race(what, together, apart, rounds, "six runs"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--command", type=int, default=0)
    parser.add_argument("--several", type=int, default=0)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{'':<34} {'against':<15} {'ours s':>8} {'theirs s':>9} {'ratio':>7}  difference")
    images = torch.randint(
        0, 256, (arguments.images, 3, 64, 64), generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights or random_weights(Path(folder) / "inception.pth")
        rows = []
        if arguments.command:
            rows.append(command_row(arguments.command, weights, Path(folder)))
        if arguments.several:
            rows += several_rows(arguments.several, Path(folder), arguments.rounds)
        if not rows:
            rows = network_rows(images.to(torch.uint8), weights, arguments.rounds)
            rows += feature_rows(arguments.features, arguments.rounds)
    state = 8 * (DIM * DIM + DIM)
    print(
        f"state: {state / 2**20:.1f} MiB at any number of images; torch-fidelity keeps {4 * DIM} bytes an image"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

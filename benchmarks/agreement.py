"""Do cheap distances of few samples rank the checkpoints of a run as the full distance does?

    python benchmarks/agreement.py RUN --extractor NET.safetensors [--full 2000] [--few 500] [--json FILE]

RUN holds `checkpoints/update_*.ckpt` (train.py --keep_every N). Each is measured once: all distances of `--full`
samples, then MIND and the kernel distance of the first `--few` of them, by the same network. Spearman's correlation
over checkpoints with the full Fréchet distance says whether the FID callback may take them. All use the same seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from tessellar.cli.evaluation_run import data_of_run, split_of
from tessellar.evaluation.generation import GeneratedImages
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.references import reference_from
from tessellar.measures.density_coverage import density_coverage
from tessellar.measures.frechet import frechet_distance
from tessellar.measures.kid import kernel_distance
from tessellar.measures.mind import mind
from tessellar.measures.statistics import FeatureStatistics
from tessellar.pipeline import load_generator
from tessellar.sampling.settings import Sampling


def features_of(path: Path, count: int, extractor: Extractor) -> Tensor:
    """Features of class-balanced samples, seeds 0 to count - 1."""
    source = GeneratedImages(load_generator(path), count, Sampling())
    return torch.cat([extractor(batch.images).features for batch in source.batches(100)])


def distances(features: Tensor, reference: Any, few: int) -> dict[str, float]:
    found = {}
    for name, part in (("full", features), (f"{few}", features[:few])):
        statistics = FeatureStatistics(part.shape[1])
        statistics.update(part)
        found[f"FD {name}"] = frechet_distance(statistics.moments(), reference.moments)
    few_features = features[:few]
    found[f"MIND {few}"] = mind(few_features, reference.features)
    found[f"KD {few}"] = kernel_distance(few_features, reference.features, subset_size=few).mean
    found[f"1 - coverage {few}"] = 1 - density_coverage(few_features, reference.features).coverage
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--full", type=int, default=2000)
    parser.add_argument("--few", type=int, default=500)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    extractor = load_extractor(arguments.extractor)
    data = data_of_run(str(arguments.run / "checkpoints"))
    reference = reference_from(split_of("train", data), extractor)
    rows = {}
    for path in sorted((arguments.run / "checkpoints").glob("update_*.ckpt")):
        rows[path.stem] = distances(
            features_of(path, arguments.full, extractor), reference, arguments.few
        )
        print(
            path.stem, "  ".join(f"{name} {value:.4g}" for name, value in rows[path.stem].items())
        )
    full = [row["FD full"] for row in rows.values()]
    agreement = {}
    for name in next(iter(rows.values())):
        ranks: Any = spearmanr(full, [row[name] for row in rows.values()])
        agreement[name] = float(ranks.statistic)
        print(f"Spearman with the full distance: {name} {agreement[name]:.3f}")
    if arguments.json:
        content = {"checkpoints": rows, "spearman": agreement}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

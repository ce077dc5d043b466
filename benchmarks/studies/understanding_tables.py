"""Tables of the study of tokenizers that understand."""

from collections.abc import Sequence
from typing import Any

from benchmarks.studies.understanding_retrieval import DEPTHS

PROBED = (
    ("flat", "latents"),
    ("mean", "latents"),
    ("flat", "tokens"),
    ("mean", "tokens"),
    ("mean", "codes"),
    ("mean", "semantics"),
)


def distances_of(row: dict[str, Any]) -> list[str]:
    """Names of the distances of samples, by the first network first."""
    return [name for name in row["samples"] if name.startswith("FD(")]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: reconstructions, usage and the generator, a row a system."""
    distances = distances_of(rows[0])
    titles = ["system", "tokens", "PSNR", *[f"r{name}" for name in distances], "usage", "guidance"]
    titles += [f"generator's {name}" for name in distances]
    titles += ["accuracy", "CPU-s of the tokenizer", "of the generator"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        metrics = row["metrics"]
        cells = [row["name"], row["layout"], f"{metrics['PSNR']:.2f}"]
        cells += [f"{metrics[f'r{name}']:.2f}" for name in distances]
        cells.append(f"{metrics['usage']:.0%}" if "usage" in metrics else "-")
        cells.append(f"{row['guidance']:g}")
        cells += [f"{row['samples'][name]:.2f}" for name in distances]
        accuracy = next(value for name, value in row["samples"].items() if "accuracy" in name)
        seconds = sum(stage["cpu_seconds"] for stage in row["tokenizer"])
        cells += [f"{accuracy:.2f}", f"{seconds:,.0f}", f"{row['generator']['cpu_seconds']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def probe_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracies of the linear probe and of k-NN, and purity beside that of shuffled labels."""
    titles = ["linear / k-NN"]
    for pooling, feature in PROBED:
        titles.append(f"{feature}, {pooling}")
    titles += ["purity", "information by position"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        probes = row["probes"]
        cells = [row["name"]]
        for pooling, feature in PROBED:
            scores = [probes[pooling].get(f"{probe}({feature})") for probe in ("linear", "knn")]
            known = [f"{score:.3f}" for score in scores if score is not None]
            cells.append(" / ".join(known) or "-")
        for name in ("purity", "information by position"):
            value = probes["mean"].get(name)
            shuffled = probes["mean"].get(f"{name}, shuffled")
            cells.append("-" if value is None else f"{value:.3f} ({shuffled:.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        for feature in ("pixels", "vision.network.norm"):
            if f"linear({feature})" in row["probes"]["mean"]:
                scores = [
                    row["probes"]["mean"][f"{probe}({feature})"] for probe in ("linear", "knn")
                ]
                lines.append(f"\n{feature} of {row['name']}: {scores[0]:.3f} / {scores[1]:.3f}")
    return "\n".join(lines)


def retrieval_table(row: dict[str, Any]) -> str:
    """Markdown: shares found among the first 1, 5 and 10, and what chance finds."""
    titles = []
    for way in ("texts", "images"):
        titles += [f"{way} at {depth}" for depth in DEPTHS]
    lines = [f"| features | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    found = {"SEED, its own": row["own"]}
    for name, metrics in row["probes"].items():
        for feature in dict.fromkeys(key.partition("(")[2][:-1] for key in metrics):
            scores = {title: metrics[f"{title}({feature})"] for title in titles}
            found[f"{name}, probe of {feature}"] = scores
    found["chance"] = row["chance"]
    for name, scores in found.items():
        cells = [f"{scores[title]:.1%}" for title in titles]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)

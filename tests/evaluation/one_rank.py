"""One process of an evaluation, for test_processes.py: `one_rank.py RANK WORLD FOLDER`.

Writes its record, and what the collective operations gave, to FOLDER/rank<RANK>.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tessellar import distributed
from tessellar.evaluation import engine
from tessellar.evaluation.engine import Yardstick
from tessellar.evaluation.networks.loading import load_extractors
from tessellar.evaluation.references import references_from
from tessellar.evaluation.sources import ArrayImages

METRICS = ("fd", "is", "kid", "pr", "accuracy", "mind", "cmmd", "dc", "fdinf")


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
    )
    record = evaluate(folder, f"cache-{world}")
    uneven = distributed.gather_rows(torch.arange(3 * (1 - rank)))  # 3 rows and none
    result = {
        "record": record,
        "share": list(distributed.own_share(5)),
        "gathered": uneven.tolist(),
        "objects": distributed.all_gather({"rank": rank}),
        "broadcast": distributed.broadcast(f"from {rank}"),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def evaluate(folder: Path, cache: str) -> dict:
    """The record of FOLDER/samples.npz against FOLDER/reference.npz."""
    extractors = load_extractors([folder / "tiny.safetensors", folder / "headless.safetensors"])
    images = ArrayImages(folder / "reference.npz")
    references = references_from(images, extractors, folder / cache, batch_size=16)
    pairs = zip(extractors, references, strict=True)
    yardsticks = [Yardstick(*pair) for pair in pairs]
    samples = ArrayImages(folder / "samples.npz")
    return engine.evaluate(samples, yardsticks, metrics=METRICS, batch_size=16)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

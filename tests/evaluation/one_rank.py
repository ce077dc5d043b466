"""One process of an evaluation, for test_processes.py: `one_rank.py RANK WORLD FOLDER`.

Writes its record, and what the collective operations gave, to FOLDER/rank<RANK>.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tessellar import distributed
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.references import reference_from
from tessellar.evaluation.sources import ArrayImages

METRICS = ("fd", "is", "kid", "pr", "accuracy")


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
    extractor = load_extractor(folder / "tiny.safetensors")
    reference = reference_from(
        ArrayImages(folder / "reference.npz"), extractor, folder / cache, batch_size=16
    )
    return evaluate_samples(
        ArrayImages(folder / "samples.npz"), extractor, reference, metrics=METRICS, batch_size=16
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""What drafts are worth, on the small model of gray levels (gray_model.py): evaluations an image by who drafts.

    python benchmarks/drafters.py --fashion DIR --gray gray.safetensors [--updates 300] [--images 24] [--guidance 1]

FLASH's drafter is trained against the frozen model first. Siblings (SJD-PAC, arXiv 2603.18599) are further drafts of
the first place of a window; an evaluation with K of them computes K times as much.
"""

import argparse
import time

import torch
from gray_model import SIDE, levels_of, load_gray

from tessellar.data import FashionMNISTData
from tessellar.models.flash import FlashDrafter
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant
from tessellar.protocol.noise import Noise
from tessellar.sampling.couplings import COUPLINGS
from tessellar.sampling.flash import flash_drafts
from tessellar.sampling.report import Recorder
from tessellar.sampling.speculative import Rules, speculative_jacobi


def trained_drafter(model: LlamaGen, folder: str, updates: int, guidance: float) -> FlashDrafter:
    """A drafter of 5 tokens, trained on the images that the model was trained on."""
    torch.manual_seed(1)
    drafter = FlashDrafter(model.layout, model.width, 1, 4, 10, drafts=5, guidance=guidance)
    drafter.learn_from(model)
    data = FashionMNISTData(folder).train_dataset()
    stream = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW((p for p in drafter.parameters() if p.requires_grad), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates)
    started = time.process_time()
    for update in range(updates):
        chosen = torch.randint(len(data), (16,), generator=stream).tolist()
        tokens = levels_of(data.batch(chosen)["image"])
        losses = drafter.loss(tokens, Condition(ids=data.labels[chosen]))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 50 == 0 or update == updates - 1:
            terms = ", ".join(f"{name} {float(term.detach()):.4f}" for name, term in losses.items())
            print(
                f"drafter, update {update}: {terms}, {time.process_time() - started:.0f} s",
                flush=True,
            )
    return drafter.eval()


@torch.no_grad()
def measure(model: LlamaGen, drafter: FlashDrafter, images: int, guidance: float) -> None:
    """Print a line for each way to draft."""
    condition = Condition(ids=torch.arange(images) % 10)
    rule = Constant(guidance).guidance()
    ways = {
        "SJD, window 6": Rules(6),
        "maximal coupling, uniform, window 6": Rules(6, "uniform", coupling=COUPLINGS["maximal"]),
        "SJD, window 16": Rules(16),
        "maximal coupling, uniform, window 16": Rules(16, "uniform", coupling=COUPLINGS["maximal"]),
    }
    for count in (2, 4):
        name = f"maximal coupling, uniform, window 16, {count} siblings"
        ways[name] = Rules(16, "uniform", coupling=COUPLINGS["maximal"], siblings=count)
    for name, rules in ways.items():
        recorder = Recorder()
        speculative_jacobi(model, condition, Choice(), Noise(range(images)), rule, rules, recorder)
        count = recorder.report().evaluations_per_image
        print(f"{name}: {count:.1f} evaluations, {SIDE * SIDE / count:.2f} times fewer", flush=True)
    recorder = Recorder()
    flash_drafts(model, drafter, condition, Choice(), Noise(range(images)), rule, recorder)
    report = recorder.report()
    count = report.evaluations_per_image
    taken = " ".join(f"{share:.2f}" for share in report.acceptance)
    print(
        f"FLASH, 5 drafts: {count:.1f} evaluations, {SIDE * SIDE / count:.2f} times fewer; acceptance {taken}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fashion", required=True, help="folder of the data set")
    parser.add_argument("--gray", required=True, help="weights of gray_model.py")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    model = load_gray(arguments.gray)
    drafter = trained_drafter(model, arguments.fashion, arguments.updates, arguments.guidance)
    measure(model, drafter, arguments.images, arguments.guidance)


if __name__ == "__main__":
    main()

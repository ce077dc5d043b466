"""What drafts are worth, on the small model of gray levels (gray_model.py): evaluations an image by who drafts.

    python benchmarks/drafters.py --fashion DIR --gray gray.safetensors [--updates 300] [--images 24] [--guidance 1]

FLASH's drafter is trained against the frozen model first. Siblings: SJD-PAC (arXiv 2603.18599) judges further drafts of
the first place of a window where its draft is rejected, drawn without replacement and judged by what is left of p. How
often one of K - 1 would stay is computed from the laws that meet there in plain SJD and its maximal coupling; each such
pass would commit one token more at most for each level of a tree.
"""

import argparse
import time

import torch
from gray_model import SIDE, levels_of, load_gray
from torch import Tensor

from tessellar.data import FashionMNISTData
from tessellar.models.flash import FlashDrafter
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant
from tessellar.protocol.noise import Noise
from tessellar.sampling.acceptance import plain_ratio
from tessellar.sampling.couplings import COUPLINGS
from tessellar.sampling.flash import flash_drafts
from tessellar.sampling.report import Recorder
from tessellar.sampling.speculative import Rules, speculative_jacobi

SIBLINGS = (2, 4)


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


def siblings_stay(p: Tensor, q: Tensor, draft: int, count: int) -> float:
    """Probability that one of `count` - 1 further drafts of law q stays, given that `draft` was rejected by p."""
    residual = (p - q).clamp(min=0)
    rejected = 1.0
    left = q.clone()
    drawn = draft
    for _ in range(count - 1):
        left[drawn] = 0
        if float(residual.sum()) <= 0 or float(left.sum()) <= 0:
            break
        p = residual / residual.sum()
        law = left / left.sum()
        rejected *= 1 - float(torch.minimum(p, law).sum())
        residual = (p - law).clamp(min=0)
        # One that would be rejected: the next sibling is drawn from what is left.
        worse = (law - p).clamp(min=0)
        if float(worse.sum()) <= 0:
            break
        drawn = int(torch.multinomial(worse, 1))
    return 1 - rejected


def with_siblings(model: LlamaGen, condition: Condition, rules: Rules, guidance: float) -> str:
    """A line about the first places of windows."""
    passes = 0
    rejected = 0
    stay = dict.fromkeys(SIBLINGS, 0.0)
    stream = torch.Generator().manual_seed(5)

    def measured(p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
        nonlocal passes, rejected
        chance = plain_ratio(p, q, draft)
        for image in range(len(p)):
            if float(q[image, 0, 0].sum()) == 0:
                continue
            passes += 1
            kept = float(chance[image, 0, 0])
            if float(torch.rand((), generator=stream)) < kept:
                continue
            rejected += 1
            for count in SIBLINGS:
                stay[count] += siblings_stay(
                    p[image, 0, 0], q[image, 0, 0], int(draft[image, 0, 0]), count
                )
        return chance

    judged = Rules(rules.window, rules.init, measured, rules.coupling)
    rule = Constant(guidance).guidance()
    speculative_jacobi(
        model, condition, Choice(), Noise(range(condition.batch)), rule, judged, None
    )
    parts = [f"first draft rejected in {rejected / passes:.3f} of {passes} passes"]
    parts += [
        f"of {count} siblings one stays in {total / passes:.3f}" for count, total in stay.items()
    ]
    return ", ".join(parts)


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
    for name, rules in ways.items():
        recorder = Recorder()
        speculative_jacobi(model, condition, Choice(), Noise(range(images)), rule, rules, recorder)
        count = recorder.report().evaluations_per_image
        print(f"{name}: {count:.1f} evaluations, {SIDE * SIDE / count:.2f} times fewer", flush=True)
        if rules.window == 16:
            print(f"  {with_siblings(model, condition, rules, guidance)}", flush=True)
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

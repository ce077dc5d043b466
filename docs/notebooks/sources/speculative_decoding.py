# %% [markdown]
# # Speculative decoding explained
#
# A generator of N tokens needs N evaluations of its network, one after another. Speculative Jacobi decoding (SJD, arXiv 2410.01699)
# commits several tokens an evaluation without a second model and without changing the law of the samples. This notebook builds the rule
# by hand, checks it by counting, and then runs the real one.

# %%
import torch

from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioner
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

# %% parameters
DRAWS = 200_000
IMAGES = 256

# %% [markdown]
# ## The rule
#
# A draft x was drawn from some law q. The network now says that the law should be p. Accept x with probability min(1, p(x) / q(x));
# on rejection draw from the rest, (p - q)+ normalised. What comes out has law p, whatever q was: for each x
#
# $$\underbrace{q(x)\min\left(1, \tfrac{p(x)}{q(x)}\right)}_{\text{accepted}} +
# \underbrace{\left(1 - \textstyle\sum_y \min(p(y), q(y))\right)\frac{(p(x) - q(x))_+}{\sum_y (p(y) - q(y))_+}}_{\text{rejected}} =
# \min(p(x), q(x)) + (p(x) - q(x))_+ = p(x).$$
#
# The better the draft, the more often it stays: the rate of acceptance is $\sum_x \min(p(x), q(x))$.

# %%
random = torch.Generator().manual_seed(0)
p = torch.tensor([0.5, 0.3, 0.1, 0.1])
q = torch.tensor([0.25, 0.25, 0.25, 0.25])
drafts = torch.multinomial(q, DRAWS, replacement=True, generator=random)
accepted = torch.rand(DRAWS, generator=random) < (p / q)[drafts]
rest = (p - q).clamp(min=0)
redrawn = torch.multinomial(rest, DRAWS, replacement=True, generator=random)
result = torch.where(accepted, drafts, redrawn)
shares = result.bincount(minlength=4) / DRAWS
print(
    "accepted", float(accepted.float().mean()), "of", float(torch.minimum(p, q).sum()), "expected"
)
print("law of the result", [round(float(share), 3) for share in shares])
deviation = 5 * (p * (1 - p) / DRAWS).sqrt()
assert bool(((shares - p).abs() < deviation).all())  # five standard deviations

# %% [markdown]
# ## Where drafts come from
#
# SJD keeps a window of drafts behind the tokens that are certain. One evaluation scores the whole window at once, as a network in
# training does. The first draft is judged under a law that nothing can change any more; the next one is judged only if that was
# accepted, and so on. Behind the first rejection the new laws give the drafts of the next round: they are better informed than the
# last, and so the window moves on by more than one token an evaluation.
#
# ```
# certain            window of drafts
# t1 t2 t3 | x4  x5  x6  x7        evaluation: laws p4 p5 p6 p7
#          | ok  ok  no  --        x4, x5 stay, x6 is drawn from its rest, x7 is drafted anew from p7
# t1 t2 t3 t4 t5 t6 | x7 x8 ...    three tokens by one evaluation
# ```

# %% [markdown]
# ## The real one
#
# A small generator with random weights, whose laws are far from flat. Both algorithms draw the same number of images.

# %%
torch.manual_seed(0)
tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2).eval()
network = LlamaGen(tokenizer.layout, 32, 2, 2, num_classes=3, ffn_multiple_of=8).eval()
torch.nn.init.normal_(network.output.weight, std=0.4)
model = ImageGenerator(tokenizer, network, ClassConditioner(3)).eval()
condition = model.class_condition([1] * IMAGES)


def drawn(algorithm, first_seed: int):
    """Tokens [IMAGES, 16] and the report of their drawing."""
    recorder = Recorder()
    sampling = Sampling(algorithm=algorithm, choice=Choice())
    seeds = range(first_seed, first_seed + IMAGES)
    return model.sample_tokens(condition, sampling, seeds, recorder), recorder.report()


plain, report = drawn(Ancestral(), 0)
print("one by one:  ", f"{report.evaluations_per_image:.1f} evaluations an image")
fast, fast_report = drawn(SpeculativeJacobi(window=8), IMAGES)
print("speculative: ", f"{fast_report.evaluations_per_image:.1f} evaluations an image")
print("acceptance by slot of the window:", [round(rate, 2) for rate in fast_report.acceptance])
assert fast_report.evaluations_per_image < report.evaluations_per_image

# %% [markdown]
# Other seeds, so other images: what is equal is their law. The frequency of each code, over all positions, within what counting allows:

# %%
counts = torch.stack(
    [plain.flatten().bincount(minlength=16), fast.flatten().bincount(minlength=16)]
)
share = counts / counts.sum(1, keepdim=True)
pooled = counts.sum(0) / counts.sum()
# Tokens of an image hang together, so the bound is generous: images, not tokens, are independent.
spread = (pooled * (1 - pooled) * 2 / IMAGES).sqrt()
print(
    "largest difference in standard deviations:",
    float(((share[0] - share[1]).abs() / spread.clamp(min=1e-6)).max()),
)
assert bool(((share[0] - share[1]).abs() < 5 * spread + 1e-3).all())

# %% [markdown]
# Which algorithms keep the law and which only come close is said by each class (`tessellar show GroupedJacobi`); what they gain on a
# trained generator is measured in `docs/decoding.md`.

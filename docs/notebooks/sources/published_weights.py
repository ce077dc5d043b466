# %% [markdown]
# # Use published weights
#
# 126 published checkpoints have names here (`docs/zoo.md`). `tessellar.load(NAME)` takes the official file from a folder that mirrors the
# hub, from the hub's cache, or from the hub, and imports it: the same tensors under our names, strictly.
#
# Without a folder of files (`MIRROR` below) this notebook writes stand-ins: small models with random weights in the official format of
# xAR-B and of its VAE. Their pictures are noise; every step is the real one.

# %%
import os
from pathlib import Path

import torch
from IPython.display import display

import tessellar
from tessellar.checkpoints.zoo import published, zoo
from tessellar.cli.main import dispatch
from tessellar.models.xar import XAR
from tessellar.models.xar.official import to_official as generator_keys
from tessellar.processes.flow import EulerMaruyama
from tessellar.protocol.layout import Continuous, grid_layout
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae.official import to_official as vae_keys
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck

# %% parameters
MIRROR = ""  # folder with OliverRen/xAR/xAR-B.pth and mar/kl16.ckpt; empty: stand-ins are written
STEPS = 40  # of the solver, an entity

# %% [markdown]
# ## What there is
#
# The facts of an entry are those that its paper and its repository state, and `unknown` where they do not.

# %%
print(
    len(zoo()),
    "published checkpoints;",
    ", ".join(sorted({each.system for each in zoo().values()})),
)
entry = published("xar/b")
print(
    entry.source,
    "|",
    entry.license,
    "|",
    f"{entry.parameters:,} parameters",
    "|",
    dict(entry.published),
)
print(entry.evaluation())

# %% [markdown]
# ## Files
#
# On a machine with the hub nothing is to be done here.

# %%
root = Path(MIRROR or "mirror")
if not MIRROR:
    torch.manual_seed(0)
    vae = KLVAE(GaussianBottleneck(16), 256, 32, (1, 1, 1, 1, 1), 1)
    small = XAR(grid_layout(16, 16, Continuous(16)), "cell:8x8", 64, 1, 1, 1000)
    rotation = {"encoder_blocks.0.attn.rope.freqs": torch.ones(16)}  # tells the number of heads
    for name, content in (
        ("mar/kl16.ckpt", {"model": vae_keys(vae)}),
        ("OliverRen/xAR/xAR-B.pth", {**generator_keys(small), **rotation}),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, root / name)
os.environ["TESSELLAR_MIRROR"] = str(root)

# %% [markdown]
# ## Load and sample
#
# A stand-in has another number of parameters than the entry states, and loading says so.

# %%
generator = tessellar.load("xar/b")
images = generator.sample(
    classes=["goldfish"],
    count=1,
    sampling=Sampling(flow=EulerMaruyama(STEPS)),
    guidance=2.7,
    seed=0,
)
display(images[0])

# %% [markdown]
# ## An export, for commands
#
# `sample.py` and `evaluate.py` read exports: a folder without pickle, with a card that says where the weights came from and whom to cite.

# %%
dispatch("convert", ["import", "xar", "b", "--out", "exports/xar-b", "--overwrite", "true"])
print(Path("exports/xar-b/README.md").read_text()[:600])
assert images[0].size == (256, 256)

# %% [markdown]
# The published number is then measured by the command that `evaluation()` printed above.

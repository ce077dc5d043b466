# %% [markdown]
# # From your own LlamaGen fork to a paper folder
#
# You have a repository of your own: a fork of LlamaGen, say, with one change and a checkpoint. Here it becomes a folder that tessellar
# trains, samples and measures like any of its own: a model, a table of keys, a YAML, a recording of your code's outputs, and a replay
# that proves on any machine that both compute the same.

# %%
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tessellar
from tessellar.cli.main import dispatch

# %% parameters
UPDATES = 300
IMAGES = 20000

# %% [markdown]
# ## Your repository
#
# A plain GPT of LlamaGen's kind: tokens of a grid behind a class token, two-dimensional rotary positions, SwiGLU. **The change**: logits
# are soft-capped, `c * tanh(logits / c)`. This file knows nothing of tessellar.

# %%
FORK = '''
"""myfork/gpt.py: the official code."""

import torch
import torch.nn.functional as F
from torch import nn


def rotations(side, head_dim):
    freqs = 1.0 / 10000 ** (torch.arange(head_dim // 4) / (head_dim // 4))
    place = torch.arange(side * side)
    angles = torch.cat([(place // side)[:, None] * freqs, (place % side)[:, None] * freqs], -1)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), torch.stack([angles.cos(), angles.sin()], -1)])


def rotate(x, table):
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = table[None, : x.shape[1], None].unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Block(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, table):
        b, n, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).unbind(2)
        q, k = rotate(q, table), rotate(k, table)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + self.proj(out.transpose(1, 2).reshape(b, n, dim))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GPT(nn.Module):
    def __init__(self, codes, classes, side, dim=64, depth=2, heads=4, hidden=192, cap=8.0):
        super().__init__()
        self.cap = cap
        self.label = nn.Embedding(classes + 1, dim)
        self.tokens = nn.Embedding(codes, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, hidden) for _ in range(depth)])
        self.norm, self.head = nn.RMSNorm(dim, eps=1e-5), nn.Linear(dim, codes, bias=False)
        self.register_buffer("table", rotations(side, dim // heads), persistent=False)

    def forward(self, labels, ids):  # logits of every token: [B, N, codes]
        x = torch.cat([self.label(labels)[:, None], self.tokens(ids[:, :-1])], 1)
        for block in self.blocks:
            x = block(x, self.table)
        logits = self.head(self.norm(x))
        return self.cap * torch.tanh(logits / self.cap)
'''
Path("myfork").mkdir(exist_ok=True)
Path("myfork/gpt.py").write_text(FORK)
Path("myfork/__init__.py").write_text("")

# %% [markdown]
# ## The model
#
# Only the change: everything else is `LlamaGen`. A class that builds from plain arguments can be written into a YAML and an export.

# %%
HEADER = '''"""CapGen: LlamaGen (arXiv 2406.06525) with soft-capped logits."""

from capgen.model import CapGen

__all__ = ["CapGen"]
'''
MODEL = '''"""CapGen: a LlamaGen whose logits are c tanh(logits / c)."""

import torch
from torch import Tensor, nn

from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.layout import Layout


class CappedLinear(nn.Linear):
    """A linear map without bias, and the cap on what it gives."""

    def __init__(self, width: int, out: int, cap: float) -> None:
        super().__init__(width, out, bias=False)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().forward(x) / self.cap)


class CapGen(LlamaGen):
    """LlamaGen's generator of classes, its logits capped."""

    def __init__(
        self,
        layout: Layout,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        num_classes: int = 10,
        cap: float = 8.0,
    ) -> None:
        super().__init__(layout, width, depth, num_heads, num_classes, ffn_multiple_of=64)
        weight = self.output.weight
        self.output = CappedLinear(width, len(weight), cap)
        self.output.weight = weight
'''

# %% [markdown]
# ## The table of keys
#
# Theirs on the left, ours on the right; what has no rule is an error that lists it. Sizes are read from the tensors' shapes.

# %%
OFFICIAL = '''"""The checkpoints of myfork, keys to ours and back."""

from tessellar.interop.importer import GeneratorImporter
from tessellar.interop.keys import table

from capgen.model import CapGen

HEADS = 4


def build(state, layout, options):
    classes, width = state["label.weight"].shape
    depth = len([name for name in state if name.endswith(".qkv.weight")])
    return OFFICIAL.fill(CapGen(layout, width, depth, options.num_heads or HEADS, classes - 1), state)


OFFICIAL = GeneratorImporter(
    what="a CapGen generator",
    marks=("label.weight", "blocks.0.gate.weight"),
    entries=("ema", "model"),
    keys=table(
        {
            "label.weight": "conditioning.embedding.weight",
            "tokens.weight": "token_embedding.weight",
            "blocks.{i}.norm1.weight": "layers.{i}.attention_norm.weight",
            "blocks.{i}.norm2.weight": "layers.{i}.ffn_norm.weight",
            "blocks.{i}.qkv.weight": "layers.{i}.attention.wqkv.weight",
            "blocks.{i}.proj.weight": "layers.{i}.attention.wo.weight",
            "blocks.{i}.gate.weight": "layers.{i}.feed_forward.w1.weight",
            "blocks.{i}.up.weight": "layers.{i}.feed_forward.w3.weight",
            "blocks.{i}.down.weight": "layers.{i}.feed_forward.w2.weight",
            "norm.weight": "norm.weight",
            "head.weight": "output.weight",
        }
    ),
    build=build,
)
'''

# %% [markdown]
# ## The recording and its replay
#
# `record` runs your code once; weights, inputs and outputs go into a folder that travels with the package. A replay computes the same
# outputs with our module.

# %%
RECORDING = '''"""Outputs of the official code."""

import torch

from myfork.gpt import GPT
from tessellar.parity.recorder import Recorder


def record(recorder: Recorder) -> None:
    torch.manual_seed(0)
    official = GPT(codes=16, classes=3, side=4).eval()
    recorder.config |= {"codes": 16, "side": 4}
    recorder.weights("model", official.state_dict())
    labels = recorder.input("labels", torch.tensor([0, 2, 3]), "logits", "classes; 3 is none")
    ids = recorder.input("ids", torch.randint(16, (3, 16)), "logits", "tokens of a 4 x 4 grid")
    with torch.no_grad():
        recorder.output("logits", official(labels, ids), "logits")
'''
PARITY = '''"""Replays of the recorded outputs."""

import torch

from capgen.official import OFFICIAL
from tessellar.interop.importer import ImportOptions
from tessellar.parity.generation import scores_of
from tessellar.parity.registration import replays
from tessellar.protocol.layout import Categorical, grid_layout


@replays("capgen", "logits")
def logits(recording):
    side = recording.config["side"]
    layout = grid_layout(side, side, Categorical(recording.config["codes"]))
    generator = OFFICIAL.build(recording.weights["model"], layout, ImportOptions())
    condition = recording.classes("labels")
    with torch.no_grad():
        return {"logits": scores_of(generator, recording.inputs["ids"], condition).logits}
'''
files = {
    "__init__": HEADER,
    "model": MODEL,
    "official": OFFICIAL,
    "recording": RECORDING,
    "parity": PARITY,
}
Path("capgen").mkdir(exist_ok=True)
for name, text in files.items():
    Path(f"capgen/{name}.py").write_text(text)
sys.path.insert(0, str(Path.cwd()))

# %%
dispatch(
    "convert",
    [
        "record",
        "capgen.recording",
        "--out",
        "recorded/capgen",
        "--package",
        "capgen",
        "--overwrite",
        "true",
    ],
)
code = dispatch("convert", ["verify", "recorded/capgen", "--package", "capgen"])
assert not code, "our module computes something else"

# %% [markdown]
# A replay that cannot fail proves nothing. With the rows of the recorded head in another order it fails:

# %%
weights = load_file("recorded/capgen/weights.safetensors")
save_file(
    {**weights, "head.weight": weights["head.weight"].flip(0)},
    "recorded/capgen/weights.safetensors",
)
assert dispatch("convert", ["verify", "recorded/capgen", "--package", "capgen"]) == 1
save_file(weights, "recorded/capgen/weights.safetensors")

# %% [markdown]
# ## The YAML, a run, and your own checkpoint
#
# The tokenizer first (ours, on shapes), then CapGen on its tokens.

# %%
short = ["--trainer.max_steps", str(UPDATES), "--trainer.val_check_interval", str(UPDATES)]
short += ["--data.init_args.length", str(IMAGES)]
dispatch("train", ["--config", "demo/tokenizer", "--name", "shapes", *short])
CONFIG = """
seed_everything: 0
trainer: {accelerator: cpu, check_val_every_n_epoch: null, num_sanity_val_steps: 0}
model:
  class_path: tessellar.training.generator_module.GeneratorModule
  init_args:
    tokenizer: runs/shapes/export
    generator:
      class_path: capgen.CapGen
      init_args: {cap: 8.0}
    optimizer: {name: adamw, lr: 0.002}
    schedule: {decay: linear, warmup: 20, decay_start: 0.5}
data:
  class_path: tessellar.data.ShapesData
  init_args: {size: 24, val_length: 256, batch_size: 64}
"""
Path("capgen.yaml").write_text(CONFIG)
dispatch("train", ["--config", "capgen.yaml", "--name", "capgen", "--package", "capgen", *short])

# %% [markdown]
# And the other way: a checkpoint of your repository becomes an export over any tokenizer whose codes it was trained on.

# %%
from myfork.gpt import GPT

torch.manual_seed(1)
torch.save({"model": GPT(codes=256, classes=10, side=6).state_dict()}, "myfork.pt")
words = [
    "import",
    "capgen",
    "myfork.pt",
    "--tokenizer",
    "runs/shapes/export",
    "--out",
    "exports/capgen",
]
dispatch("convert", [*words, "--package", "capgen", "--overwrite", "true"])
generator = tessellar.load_generator("exports/capgen", trust=("capgen",))
image = generator.sample(classes=[3], seed=0)[0]
assert image.size == (24, 24)

# %% [markdown]
# To bring it into tessellar itself, the folder moves to `models/capgen/` and its imports become `tessellar.models.capgen`:
# CONTRIBUTING.md says what else a paper needs (a recipe, a test, a line of documentation that a script writes).

# %% [markdown]
# # A new tokenizer in 60 lines
#
# A tokenizer of your own, in a package of your own: trained, looked at, and used by a generator, without an edit of tessellar. It needs a
# `layout` (which tokens, in which order), `encode`, `decode` and `forward` (reconstruction, tokens, losses).
#
# This one cuts the image into patches, mixes them with a small MLP-mixer and rounds each of three channels to five levels (finite
# scalar quantization, so 125 codes and no codebook).

# %%
import sys
from pathlib import Path

import torch
from IPython.display import Image, display

import tessellar
from tessellar.cli.main import dispatch
from tessellar.data import ShapesData

# %% parameters
UPDATES = 500
IMAGES = 20000

# %% [markdown]
# ## The package
#
# One file is enough. Classes are named by their public path, `mixertok.MixerTokenizer`, so keep that name once exports exist.

# %%
SOURCE = '''
"""A tokenizer of mixed patches whose channels are rounded to levels."""

from einops import rearrange
from torch import Tensor, nn

from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.tokenizers.quantizers.fsq import FSQ


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Mixer(nn.Module):
    """Mixes over the positions, then over the channels of x [B, N, D]."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.over_positions = mlp(positions)
        self.over_channels = mlp(width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_positions(self.norms[0](x).mT).mT
        return x + self.over_channels(self.norms[1](x))


class MixerTokenizer(Tokenizer):
    """Images of [B, 3, H, W] in [-1, 1] as a grid of codes."""

    def __init__(self, image_size: int = 24, patch: int = 4, width: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.image_size = (image_size, image_size)
        self.patch = patch
        self.side = image_size // patch
        self.quantizer = FSQ([5, 5, 5])
        self.layout = grid_layout(self.side, self.side, Categorical(5 * 5 * 5))
        self.into = nn.Linear(3 * patch**2, width)
        self.encoder = nn.Sequential(*[Mixer(self.side**2, width) for _ in range(depth)], nn.Linear(width, 3))
        self.decoder = nn.Sequential(nn.Linear(3, width), *[Mixer(self.side**2, width) for _ in range(depth)])
        self.out = nn.Linear(width, 3 * patch**2)

    @property
    def last_layer(self) -> Tensor:
        """What the weight of an adversarial loss is measured at."""
        return self.out.weight

    def latents(self, images: Tensor) -> Tensor:
        cut = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        return self.encoder(self.into(cut))

    def render(self, vectors: Tensor) -> Tensor:
        out = self.out(self.decoder(vectors))
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=self.side, p=self.patch, q=self.patch)

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        return self.render(self.quantizer.decode(tokens))

    def forward(self, images: Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self.latents(images))
        return TokenizerOutput(self.render(quantized.quantized), quantized.tokens, quantized.losses)
'''
Path("mixertok").mkdir(exist_ok=True)
Path("mixertok/__init__.py").write_text(SOURCE)
print(len([line for line in SOURCE.splitlines() if line.strip()]), "lines")
sys.path.insert(0, str(Path.cwd()))

# %% [markdown]
# ## Two checks before training
#
# Tokens have the shape of the layout, and what training sees is what decoding gives.

# %%
from mixertok import MixerTokenizer

made = MixerTokenizer().eval()
noise = torch.rand(2, 3, 24, 24) * 2 - 1
tokens = made.encode(noise)
assert tokens.shape == (2, made.layout.length) and int(tokens.max()) < 125
assert torch.allclose(made(noise).reconstruction, made.decode(tokens), atol=1e-5)
print(made.layout)

# %% [markdown]
# ## Train it
#
# The YAML of our own tokenizer, with another class in its place. `--package` names what may be imported.

# %%
CONFIG = f"""
seed_everything: 0
trainer:
  max_steps: {UPDATES}
  accelerator: cpu
  check_val_every_n_epoch: null
  val_check_interval: {UPDATES}
  num_sanity_val_steps: 0
model:
  class_path: tessellar.training.tokenizer_module.TokenizerModule
  init_args:
    tokenizer: {{class_path: mixertok.MixerTokenizer}}
    loss:
      class_path: tessellar.tokenizers.losses.tokenizer_loss.TokenizerLoss
      init_args:
        reconstruction: {{l1: 1.0, l2: 0.5}}
    optimizer: {{name: adamw, lr: 0.002}}
    schedule: {{decay: linear, warmup: 20, decay_start: 0.5}}
data:
  class_path: tessellar.data.ShapesData
  init_args: {{size: 24, length: {IMAGES}, val_length: 256, batch_size: 64}}
"""
Path("mixer.yaml").write_text(CONFIG)
dispatch("train", ["--config", "mixer.yaml", "--name", "mixer", "--package", "mixertok"])
display(Image(str(sorted(Path("runs/mixer/pictures").glob("reconstructions_*.png"))[-1])))

# %% [markdown]
# ## It is a tokenizer like any other
#
# Loaded with its package named, measured, and read by any generator whose layout fits.

# %%
tokenizer = tessellar.load_tokenizer("runs/mixer/export", trust=("mixertok",))
data = ShapesData(size=24, length=64, val_length=16, batch_size=16)
data.setup("fit")
images = next(iter(data.val_dataloader()))["image"]
with torch.no_grad():
    again = tokenizer.decode(tokenizer.encode(images))
print("mean squared error:", float((again - images).square().mean()))
assert again.shape[1:] == (3, 24, 24)

# %%
words = ["--config", "demo/generator", "--name", "on-mixer", "--package", "mixertok"]
words += ["--model.tokenizer", "runs/mixer/export", "--trainer.max_steps", str(UPDATES)]
words += ["--trainer.val_check_interval", str(UPDATES)]
words += ["--data.init_args.length", str(IMAGES)]
dispatch("train", words)
generator = tessellar.load_generator("runs/on-mixer/export", trust=("mixertok",))
display(generator.sample(classes=["star"], guidance=2.0, seed=0)[0].resize((96, 96), resample=0))

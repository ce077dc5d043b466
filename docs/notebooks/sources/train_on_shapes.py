# %% [markdown]
# # Train on shapes
#
# A tokenizer, a generator on its tokens, samples, and a number: on pictures that are generated, so nothing is downloaded. With the sizes
# below it takes about five minutes on two CPU cores; `pip install tessellar` is enough, no checkout is needed.
#
# Each `tessellar("train", ...)` here is what `tessellar train ...` does in a shell.

# %%
import json
from pathlib import Path

from IPython.display import Image, display

import tessellar
from tessellar.cli.main import dispatch
from tessellar.data import ShapesData


def command(*words: str) -> None:
    """Run `tessellar WORDS`."""
    dispatch(words[0], [str(word) for word in words[1:]])


# %% parameters
TOKENIZER_UPDATES = 700
GENERATOR_UPDATES = 1400
IMAGES = 20000
PER_CLASS = 6

# %% [markdown]
# ## The data
#
# Ten classes of shapes in eight colours, 24 x 24 pixels. A batch has floats
# `[B, 3, H, W]` in [-1, 1] and class ids.

# %%
data = ShapesData(size=24, length=64, val_length=16, batch_size=16)
data.setup("fit")
batch = next(iter(data.train_dataloader()))
pixels = batch["image"]
print(pixels.shape, pixels.dtype, float(pixels.min()), float(pixels.max()), batch["label"][:4])
print(data.class_names)

# %% [markdown]
# ## The tokenizer
#
# A ViT-VQ: 24 x 24 pixels become 6 x 6 tokens of 256 codes. The config is one of ours; any key can be changed on the command line.

# %%
SHORT = ["--data.init_args.length", IMAGES]
command(
    "train",
    "--config",
    "demo/tokenizer",
    "--name",
    "shapes-tokenizer",
    "--trainer.max_steps",
    TOKENIZER_UPDATES,
    "--trainer.val_check_interval",
    TOKENIZER_UPDATES,
    *SHORT,
)

# %% [markdown]
# Originals above their reconstructions. What the tokenizer cannot show, no generator on its tokens can draw.

# %%
pictures = sorted(Path("runs/shapes-tokenizer/pictures").glob("reconstructions_*.png"))
display(Image(str(pictures[-1])))

# %% [markdown]
# ## The generator
#
# A small LlamaGen predicts the 36 tokens one after another, given the class.

# %%
command(
    "train",
    "--config",
    "demo/generator",
    "--name",
    "shapes-generator",
    "--model.tokenizer",
    "runs/shapes-tokenizer/export",
    "--trainer.max_steps",
    GENERATOR_UPDATES,
    "--trainer.val_check_interval",
    GENERATOR_UPDATES,
    *SHORT,
)

# %% [markdown]
# ## Samples
#
# Image i depends on `seed + i` and its class alone. Guidance 2 pulls samples towards their class.

# %%
generator = tessellar.load_generator("runs/shapes-generator/export")
images = generator.sample(classes=["circle", "star"], count=2 * PER_CLASS, guidance=2.0, seed=0)
for image in images[:4]:
    display(image.resize((96, 96), resample=0))

# %% [markdown]
# ## A number
#
# Distances need a network; without one the likelihood of held-out tokens is a number too, and the run wrote it at each validation.

# %%
rows = Path("runs/shapes-generator/metrics.csv").read_text().splitlines()
print(rows[0])
print(rows[-1])
record = json.loads(Path("runs/shapes-generator/run.json").read_text())
print({key: record[key] for key in ("status", "updates")})
assert len(images) == 2 * PER_CLASS

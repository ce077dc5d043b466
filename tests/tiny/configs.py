"""Models of the smallest runs, as YAMLs of `train.py` have them: a tokenizer and a generator of a few thousand
parameters on images of 16 pixels. Every call gives a copy, to be changed at will.
"""

from typing import Any


def tokenizer_model(**further: Any) -> dict[str, Any]:
    """`model` of a run that trains a ViT-VQ; `further` arguments are the training module's."""
    tokenizer = {
        "class_path": "tessellar.tokenizers.vit_vq.ViTVQ",
        "init_args": {
            "image_size": 16,
            "width": 16,
            "encoder_depth": 1,
            "decoder_depth": 1,
            "num_heads": 2,
            "quantizer": {
                "class_path": "tessellar.tokenizers.quantizers.vq.VectorQuantizer",
                "init_args": {"vocab_size": 16, "dim": 4},
            },
        },
    }
    loss: dict[str, Any] = {
        "class_path": "tessellar.tokenizers.losses.tokenizer_loss.TokenizerLoss",
        "init_args": {},
    }
    return {
        "class_path": "tessellar.training.tokenizer_module.TokenizerModule",
        "init_args": {"tokenizer": tokenizer, "loss": loss, **further},
    }


def tokenizer_run(
    updates: int, validate_every: int, save_every: int, **further: Any
) -> dict[str, Any]:
    """The config of a run of `updates` on coloured shapes."""
    return {
        "trainer": {
            "max_steps": updates,
            "accelerator": "cpu",
            "check_val_every_n_epoch": None,
            "val_check_interval": validate_every,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
        },
        "log_every": 1,
        "save_every": save_every,
        "model": tokenizer_model(**further),
        "data": {
            "class_path": "tessellar.data.ShapesData",
            "init_args": {"size": 16, "length": 64, "val_length": 16, "batch_size": 8},
        },
    }

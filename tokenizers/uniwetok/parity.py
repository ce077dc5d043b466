"""Replays of UniWeTok's recorded outputs: features, bits, and the image of them with recorded noise,
of square and other images.
"""

from tessellar.parity.forms import as_map, as_vectors
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import RecordedNoise
from tessellar.tokenizers.bitdance.parity import signs_of
from tessellar.tokenizers.uniwetok.official import from_official
from tessellar.tokenizers.uniwetok.tokenizer import UniWeTok

READ = "z_channels ch ch_mult num_res_blocks resolution attn_blocks n_heads".split()
SUPPORTED = {"double_z": False, "in_channels": 3, "out_ch": 3}


def recorded_tokenizer(recording: Recording, image_size: tuple[int, int]) -> UniWeTok:
    options = recording.options("ddconfig", READ, SUPPORTED)
    made = from_official(recording.weights["model"], image_size, options["n_heads"])
    channels = made.encoder.conv_in.out_channels
    found = {
        "z_channels": made.quantizer.dim,
        "ch": channels,
        "ch_mult": [level.res[0].conv1.out_channels // channels for level in made.encoder.levels],  # type: ignore[union-attr, index]
        "attn_blocks": len(made.encoder.attention.blocks),
    }
    recording.check_sizes(found, "ddconfig")
    return made


@replays("uniwetok", "*")
def both_ways(recording: Recording) -> Outputs:
    """Every recorded image encoded, and its bits drawn with the recorded noise."""
    outputs = {}
    for case in sorted(recording.output_cases):
        images = recording.inputs[f"{case}.image"]
        tokenizer = recorded_tokenizer(recording, (images.shape[2], images.shape[3]))
        height = tokenizer.grid[0]
        tokens = tokenizer.encode(images)
        noise = RecordedNoise([as_vectors(recording.inputs[f"{case}.dec_noise"])])
        outputs[f"{case}.enc_out"] = as_map(tokenizer.latents(images), height)
        outputs[f"{case}.bits"] = signs_of(tokens, height)
        outputs[f"{case}.dec_image"] = tokenizer.decode(tokens, noise)
    return outputs

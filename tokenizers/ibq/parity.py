"""Replays of the official IBQ tokenizer (recordings of system `seed_voken`)."""

from torch import Tensor

from tessellar.checkpoints.weights import part_of
from tessellar.interop.options import check_options
from tessellar.parity.forms import as_map
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.ibq.official import from_official

SUPPORTED = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
SHOWN = "z_channels resolution ch ch_mult num_res_blocks attn_resolutions".split()


@replays("seed_voken", "ibq")
def tokenizer(recording: Recording) -> dict[str, Tensor]:
    """Maps before the quantizer, codes, their vectors and their images."""
    config = recording.config["ibq"]
    check_options(config["dd"], "the tokenizer's ddconfig", SHOWN, SUPPORTED)
    weights = part_of(recording.weights["model"], "ibq_tok.")
    made = from_official(weights, config["dd"]["resolution"])
    images = recording.inputs["ibq.image"]
    tokens = made.encode(images)
    return {
        "ibq.h": made.maps(images),
        "ibq.idx": tokens,
        "ibq.z_q": as_map(made.quantizer.decode(tokens), made.grid[0]),
        "ibq.dec_image": made.decode(tokens),
    }

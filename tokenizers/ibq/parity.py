"""Replays of the official IBQ tokenizer (recordings of system `seed_voken`)."""

from tessellar.parity.forms import as_map
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.ibq.official import from_official

SUPPORTED = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
SHOWN = "z_channels resolution ch ch_mult num_res_blocks attn_resolutions".split()


@replays("seed_voken", "ibq")
def tokenizer(recording: Recording) -> Outputs:
    """Maps before the quantizer, codes, their vectors and their images."""
    config = recording.options("ibq.dd", SHOWN, SUPPORTED)
    made = from_official(recording.state("ibq_tok."), config["resolution"])
    images = recording.inputs["ibq.image"]
    tokens = made.encode(images)
    return {
        "ibq.h": made.maps(images),
        "ibq.idx": tokens,
        "ibq.z_q": as_map(made.quantizer.decode(tokens), made.grid[0]),
        "ibq.dec_image": made.decode(tokens),
    }

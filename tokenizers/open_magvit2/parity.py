"""Replays of the official Open-MAGVIT2 tokenizer (recordings of system `seed_voken`)."""

from tessellar.interop.options import require
from tessellar.parity.forms import as_map
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.open_magvit2.official import from_official

SUPPORTED = {"double_z": False, "in_channels": 3, "out_ch": 3}
SHOWN = "z_channels resolution ch ch_mult num_res_blocks".split()  # by shapes, or read here


@replays("seed_voken", "lfq")
def tokenizer(recording: Recording) -> Outputs:
    """Features, codes as signs and as integers, whole and by sub-token, and images of the codes."""
    config = recording.options("lfq.dd", SHOWN, SUPPORTED)
    require(recording.settings("lfq.idx"), "the codes", {"big_endian": False})
    split = tuple(recording.config["lfq"]["bits"])
    made = from_official(recording.state("lfq_tok."), config["resolution"], split)
    images = recording.inputs["lfq.image"]
    tokens = made.encode(images)
    first, second = tokens.unbind(-1)
    return {
        "lfq.enc_out": made.maps(images),
        "lfq.quant": as_map(made.quantizer.decode(tokens), made.grid[0]),
        "lfq.idx": first + (second << split[0]),
        "lfq.idx_pre": first,
        "lfq.idx_post": second,
        "lfq.dec_image": made.decode(tokens),
    }

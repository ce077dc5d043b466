"""Replays of the official Open-MAGVIT2 tokenizer (recordings of system `seed_voken`)."""

from torch import Tensor

from tessellar.checkpoints.weights import part_of
from tessellar.interop.options import check_options, require
from tessellar.parity.forms import as_map
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.open_magvit2.official import from_official

SUPPORTED = {"double_z": False, "in_channels": 3, "out_ch": 3}
SHOWN = "z_channels resolution ch ch_mult num_res_blocks".split()  # by shapes, or read here


@replays("seed_voken", "lfq")
def tokenizer(recording: Recording) -> dict[str, Tensor]:
    """Features, codes as signs and as integers, whole and by sub-token, and images of the codes."""
    config = recording.config["lfq"]
    check_options(config["dd"], "the tokenizer's ddconfig", SHOWN, SUPPORTED)
    require(recording.settings("lfq.idx"), "the codes", {"big_endian": False})
    weights = part_of(recording.weights["model"], "lfq_tok.")
    split = tuple(config["bits"])
    made = from_official(weights, config["dd"]["resolution"], split)
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

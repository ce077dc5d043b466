"""HAR's checkpoints (arXiv 2601.03955), official keys to ours and back, and the recorded outputs of the generator."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import table
from tessellar.interop.llamagen import HEADS
from tessellar.interop.llamagen_replay import greedy
from tessellar.interop.official import ImportOptions
from tessellar.interop.recording import Recording
from tessellar.interop.sizes import count
from tessellar.interop.weights import load_strict
from tessellar.models.condition import Condition
from tessellar.models.har import HAR
from tessellar.models.heads.logits import Logits
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.choice import Choice
from tessellar.sampling.guidance import NO_GUIDANCE, Constant, Guidance, Linear, Step
from tessellar.tokenizers.base import Tokenizer
from tessellar.tokenizers.layout import Categorical, Layout, sequence_layout

KEYS = table(
    {
        "cls_embedding.embedding_table.weight": "conditioning.embedding.weight",
        "tok_embeddings.weight": "token_embedding.weight",
        "spe_tok_embeddings.special_embeddings.weight": "special_embedding.weight",
        "layers.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "layers.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "output.weight": "output.weight",
    },
    drop=("freqs_cis", "*.kv_cache.*", "causal_mask"),
)
OFF = 1.0001  # what the official schedules take where guidance is off


def is_generator(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of HAR rather than of ResTok."""
    return "spe_tok_embeddings.special_embeddings.weight" in state


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    first: int = 4,
    norm_eps: float = 1e-5,
    rope_base: float = 10000.0,
    where: str = "the HAR checkpoint",
) -> HAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the tokenizer's layout."""
    vocab, width = state["output.weight"].shape
    special = state["spe_tok_embeddings.special_embeddings.weight"].shape[0]
    depth = count(state, r"layers\.(\d+)\.")
    if num_heads is None and (width, depth) not in HEADS:
        raise UserError(f"no published HAR has width {width} and depth {depth}: give --num_heads")
    hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
    generator = HAR(
        layout,
        width,
        depth,
        num_heads or HEADS[width, depth],
        state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        first,
        ffn_multiple_of=256 if -(-int(8 * width / 3) // 256) * 256 == hidden else hidden,
        norm_eps=norm_eps,
        rope_base=rope_base,
    )
    if (generator.token_embedding.num_embeddings, generator.special_embedding.num_embeddings) != (vocab, special):
        raise UserError(f"{where} is for {special + 1} tokens of {vocab} codes, but the tokenizer gives {layout}")
    load_strict(generator, KEYS.from_official(state, where), where)
    return generator.eval()


def to_official(generator: HAR) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    return KEYS.to_official(generator.state_dict())


def import_generator(state: Mapping[str, Tensor], tokenizer: Tokenizer, options: ImportOptions) -> ImageGenerator:
    """What `convert.py import restok` makes of a generator's file."""
    generator = from_official(state, tokenizer.layout, options.num_heads)
    return ImageGenerator(tokenizer, generator, generator.make_conditioner())


def recorded_generator(recording: Recording) -> HAR:
    """Our generator with the recorded weights."""
    config = recording.config["generator"]
    layout = sequence_layout(config["block_size"], Categorical(config["vocab_size"]))
    sizes = (config["n_head"], config["ar_token_num"], config["norm_eps"], config["rope_base"])
    return from_official(recording.weights["generator"], layout, *sizes)


def scores(recording: Recording, tokens: Tensor) -> dict[str, Tensor]:
    """Mask, logits and loss of the tokens that the tokenizer gives."""
    generator, condition = recorded_generator(recording), Condition(ids=recording.inputs["har_cond"])
    place = torch.arange(generator.layout.length)
    number = generator.block(place)
    visible = (number[None] <= number[:, None]).to(torch.uint8)
    with torch.no_grad():
        predicted = generator.score(tokens, condition)
        assert isinstance(predicted, Logits)
        return {"har_mask": visible, "har_logits": predicted.logits, "har_loss": predicted.cross_entropy(tokens)}


def greedy_runs(recording: Recording) -> dict[str, Tensor]:
    """Tokens and guided logits of every greedy run of the selected cases."""
    generator, condition = recorded_generator(recording), Condition(ids=recording.inputs["har_cond"])
    outputs = {}
    for name in recording.names("output", recording.cases):
        if name.startswith("har_greedy_") and f"{name}_logits" in recording.entries:
            outputs[name], outputs[f"{name}_logits"] = greedy(generator, condition, _guidance(recording, name))
    return outputs


def _guidance(recording: Recording, name: str) -> Guidance:
    """Scale, schedule and its start stand in the meaning; progress is s / (S - 1)."""
    said = recording.meanings[name]
    scale, kind = re.search(r"cfg_scale ([\d.]+\d)", said), re.search(r"schedule (\w+)", said)
    assert scale is not None and kind is not None, "the meaning says scale and schedule"
    full, steps = float(scale[1]), recording.config["generator"]["num_steps"]
    if full == 1.0:
        return NO_GUIDANCE
    if kind[1] == "constant":
        return Guidance(Constant(full))
    if kind[1] == "linear":
        return Guidance(Linear(full + OFF - 1, OFF))
    start = re.search(r"'window_start': ([\d.]+\d)", said)
    share = float(start[1]) if start else 0.0
    return Guidance(Step(full, next(s for s in range(steps) if s / (steps - 1) >= share), OFF))


def filters(recording: Recording) -> dict[str, Tensor]:
    """Which logits top-k and top-p remove."""
    logits, outputs = recording.inputs["filter_in"], {}
    for name in recording.names("output", {"gen_filter"}):
        said = recording.meanings[name]
        top_k, top_p = re.search(r"top_k=(\d+)", said), re.search(r"top_p=(0?\.\d+)", said)
        choice = Choice(top_k=int(top_k[1]) if top_k else 0, top_p=float(top_p[1]) if top_p else 1.0)
        outputs[name] = (choice.probs(logits) == 0).to(torch.uint8)
    return outputs

"""Replays of recorded passes of SJD and GSD: clusters, acceptance probabilities, what is committed,
the next drafts.

A recorded window's position 0 is the last committed token and position i + 1 the draft that the
prediction at i judges; slot i of ours is that draft. The official initial tokens are our `random`,
`repeat-left` and `argmax-left`.
"""

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.protocol.choice import Choice
from tessellar.protocol.entities import token_order
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.sampling.acceptance import Acceptance, GroupedRatio, plain_ratio
from tessellar.sampling.couplings import Judged, Verdict, verify
from tessellar.sampling.drafts import Neighbourhood, fill, sources

FORCED = 1e-30  # exponential noise that wins every race
SCHEMES = {"random": "random", "repeat_horizon": "repeat-left", "sample_horizon": "argmax-left"}


@replays("gsd", "shared", "sjd")
def plain(recording: Recording) -> Outputs:
    """SJD: the plain ratio."""
    return _judged(recording, "sjd", recording.inputs["target_probs"], plain_ratio)


@replays("gsd", "shared", "gsd")
def grouped(recording: Recording) -> Outputs:
    """GSD with the released rules, and its clusters (none for drafts of low rank, which take the
    plain ratio).
    """
    rule = released_rule(recording)
    p = Choice().probs(recording.inputs["target_logits"])
    outputs = _judged(recording, "gsd", p, rule)
    draft = recording.inputs["draft_tokens"][:, 1:]
    near, inside = rule.cluster(p[:, :-1], draft)
    least = recording.settings("gsd/window")["plain_ratio_below_rank"]
    tested = (outputs["gsd/ratio"][:, 1:] >= 0) & (near.rank >= least)
    found = tested[..., None] & (near.tokens >= 0)
    window = torch.full((*p.shape[:2], rule.group_size), -1)
    window[:, 1:] = torch.where(found, near.tokens, -1)
    mask = torch.zeros(window.shape)
    mask[:, 1:] = (found & inside).float()
    return {**outputs, "gsd/window": window, "gsd/cluster_mask": mask}


def released_rule(recording: Recording) -> GroupedRatio:
    config = recording.config
    table = recording.weights["model"]["embed_tokens.weight"]
    if not torch.equal(table, recording.inputs["embedding"]):
        raise UserError(
            f"{recording.folder}: the embedding among the inputs is not the one of the weights"
        )
    size = config["cluster_below"] + config["cluster_above_incl_self"]
    return GroupedRatio(
        size, config["p_threshold"], config["d_threshold"], table, exact_official=True
    )


def _judged(recording: Recording, case: str, p: Tensor, acceptance: Acceptance) -> Outputs:
    inputs = recording.inputs
    draft = inputs["draft_tokens"]
    q = inputs["draft_probs"]
    probability = acceptance(p[:, :-1], q[:, 1:], draft[:, 1:])
    verdict = recorded_verdict(recording, p, acceptance)
    committed = (verdict.accepted + 1).clamp(max=p.shape[1])
    position = torch.arange(1, p.shape[1])
    ratio = torch.full(inputs["uniforms"].shape, -1.0)
    ratio[:, 1:] = torch.where(position <= committed[:, None], probability, -1.0)
    rows = torch.arange(len(p))
    at = verdict.accepted.clamp(max=p.shape[1] - 2)
    residual = (p[rows, at] - q[rows, at + 1]).clamp(min=0)
    rejected = (verdict.accepted < p.shape[1] - 1)[:, None]
    return {
        f"{case}/ratio": ratio,
        f"{case}/committed": committed,
        f"{case}/next_tokens": verdict.tokens[..., 0],
        f"{case}/residual": torch.where(rejected, residual / residual.sum(-1, keepdim=True), 0.0),
    }


def recorded_verdict(recording: Recording, p: Tensor, acceptance: Acceptance) -> Verdict:
    """Our verification under the recorded noise; behind the rejection stand the recorded samples."""
    inputs = recording.inputs
    sampled = inputs["sampled_tokens"]
    exponential = inputs["resample_noise"][:, None].repeat(1, p.shape[1], 1)
    exponential[:, -1].scatter_(-1, sampled[:, -1:], FORCED)
    draft, q, uniform = (
        inputs[name].roll(-1, dims=1) for name in ("draft_tokens", "draft_probs", "uniforms")
    )
    q[:, -1] = 0  # the last slot has no draft

    def recorded(window: Judged) -> tuple[Tensor, Tensor]:
        return sampled[..., None], window.p

    window = (x.unsqueeze(2) for x in (p, q, draft, uniform, exponential))
    p, q, draft, uniform, exponential = window
    return verify(
        p,
        q,
        draft=draft,
        uniform=uniform,
        exponential=exponential,
        acceptance=acceptance,
        coupling=recorded,
    )


@replays("gsd", "init")
def initial(recording: Recording) -> Outputs:
    """New drafts behind committed tokens and kept drafts; a row of the recording ends with an
    end-of-line token.
    """
    inputs = recording.inputs
    config = recording.config["init"]
    codes = recording.config["vocab_size"]
    new = config["new_tokens"]
    known = torch.cat([inputs["init/input_ids"], inputs["init/additional_tokens"]], dim=1)
    laws = torch.cat([inputs["init/committed_probs"], inputs["init/additional_probs"]], dim=1)
    ranks = known.shape[1] + torch.arange(new)[None]
    rows = -(-(known.shape[1] + new - config["prefix_tokens"]) // config["row_length"])
    kind = Categorical(codes)
    layout = Layout(
        (Segment((config["prefix_tokens"],), kind), Segment((rows, config["row_length"]), kind))
    )
    uniform = (inputs["init/random_fill"] + 0.5) / codes
    outputs = {}
    for name in recording.names("output", {"init"}):
        scheme = SCHEMES[recording.settings(name)["multi_token_init_scheme"]]
        last = torch.tensor([known.shape[1] - 1])
        source = sources(scheme, Neighbourhood.of(layout), token_order(layout), ranks, last)
        filled = fill(
            scheme,
            source,
            known=known,
            vocab=torch.full_like(ranks, codes),
            law=laws[:, -1],
            uniform=uniform,
            exponential=uniform,
        )
        outputs[name] = filled.tokens
    return outputs

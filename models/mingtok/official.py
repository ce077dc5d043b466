"""The head of Ming-UniVision (arXiv 2510.06590) alone, `Ming-UniVision-16B-A3B`: official keys to ours
and back. Its language model, a mixture of experts, is not implemented here.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from tessellar.checkpoints.weights import load_strict
from tessellar.interop.keys import table
from tessellar.interop.sizes import count
from tessellar.models.mingtok.head import ConditionHead, FlowHead

_NET = "model.diffloss.net"
KEYS = table(
    {
        "model.vis_head.0.{tensor}": "to_condition.linear.{tensor}",
        "model.vis_head.1.{tensor}": "to_condition.norm.{tensor}",
        f"{_NET}.time_embed.mlp.0.{{tensor}}": "flow_head.time.fc1.{tensor}",
        f"{_NET}.time_embed.mlp.2.{{tensor}}": "flow_head.time.fc2.{tensor}",
        f"{_NET}.cond_embed.{{tensor}}": "flow_head.condition.{tensor}",
        f"{_NET}.input_proj.{{tensor}}": "flow_head.input.{tensor}",
        f"{_NET}.res_blocks.{{i}}.in_ln.{{tensor}}": "flow_head.blocks.{i}.norm.{tensor}",
        f"{_NET}.res_blocks.{{i}}.mlp.w12.{{tensor}}": "flow_head.blocks.{i}.mlp.w1.{tensor}",
        f"{_NET}.res_blocks.{{i}}.mlp.w3.{{tensor}}": "flow_head.blocks.{i}.mlp.w2.{tensor}",
        f"{_NET}.res_blocks.{{i}}.adaLN_modulation.1.{{tensor}}": "flow_head.blocks.{i}.modulation.linear.{tensor}",
        f"{_NET}.final_layer.linear.{{tensor}}": "flow_head.output.{tensor}",
        f"{_NET}.final_layer.adaLN_modulation.1.{{tensor}}": "flow_head.modulation.linear.{tensor}",
    }
)


class Head(nn.Module):
    """Both parts of the head, under the names that `MingTokAR` has for them."""

    def __init__(self, to_condition: ConditionHead, flow_head: FlowHead) -> None:
        super().__init__()
        self.to_condition = to_condition
        self.flow_head = flow_head


def head_from_official(state: Mapping[str, Tensor]) -> Head:
    """The head of the sizes that the weights show; other tensors of the file are left out."""
    kept = {}
    for name, tensor in state.items():
        if name.startswith((_NET, "model.vis_head.")):
            kept[name] = tensor
    out, hidden = kept["model.vis_head.0.weight"].shape
    width, channels = kept[f"{_NET}.input_proj.weight"].shape
    depth = count(kept, r"model\.diffloss\.net\.res_blocks\.(\d+)\.")
    head = Head(ConditionHead(hidden, out), FlowHead(channels, out, width=width, depth=depth))
    where = "the file of Ming-UniVision's head"
    load_strict(head, KEYS.from_official(kept, where), where)
    return head.eval()


def head_to_official(head: Head) -> dict[str, Tensor]:
    """The inverse of `head_from_official`."""
    return KEYS.to_official(head.state_dict())

"""Networks of timm, by name and options: the only door to `timm.create_model`.

Both may come from a file that others wrote: an export, or the metadata of an evaluation network or
a teacher. But timm takes options that open a file, reach the network or unpickle
(`checkpoint_path`, `pretrained_cfg`, `cache_dir`), and names that do (`hf-hub:...`,
`local-dir:...`). So only options that say what a network looks like pass, and only names of timm's
own list. A user's own config is held to the same: else a run could end in an export that nothing
reads.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from tessellar.errors import UserError

Options = dict[str, int | float | bool | str]
"""Options of a network as configs and files hold them."""

OPTIONS = frozenset(
    # sizes
    "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio head_dim window_size output_stride "
    "cardinality base_width stem_width stem_type block_reduce_first down_kernel_size avg_down base_depth "
    # tokens and positions
    "class_token reg_tokens num_reg_tokens no_embed_class pos_embed use_abs_pos_emb use_rot_pos_emb "
    "dynamic_img_size dynamic_img_pad strict_img_size "
    # layers
    "qkv_bias qkv_fused qk_norm scale_norm scale_attn_norm scale_mlp_norm proj_bias init_values pre_norm final_norm "
    "fc_norm use_fc_norm pool_include_prefix global_pool norm_layer act_layer swiglu_mlp ls_init_value conv_mlp "
    "conv_bias use_grn replace_stem_pool "
    # training
    "drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate drop_block_rate "
    "weight_init fix_init zero_init_last".split()
)
"""What may be given to a network; all of it plain numbers and words."""

NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)
WORD = re.compile(r"[\w.-]*", re.ASCII)


def check_network(name: str, options: Mapping[str, object]) -> None:
    """Raise UserError, in one line, unless `name` and `options` describe one of timm's networks and
    nothing else.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{str(name)[:80]!r} is not the name of a timm network, such as vit_small_patch16_224"
        )
    if not isinstance(options, Mapping):
        raise UserError(f"the options of {name} are a {type(options).__name__}, not a mapping")
    unknown = sorted(str(key) for key in options if key not in OPTIONS)
    if unknown:
        raise UserError(
            f"the options of {name} may not hold {', '.join(unknown)[:120]}; they describe its architecture: "
            f"{', '.join(sorted(OPTIONS))}"
        )
    for key, value in options.items():
        plain = isinstance(value, (bool, int, float)) or (
            isinstance(value, str) and WORD.fullmatch(value)
        )
        if not plain:
            raise UserError(
                f"the option {key} of {name} is {str(value)[:80]!r}; a number or a plain word is needed"
            )


def create_network(
    name: str, options: Mapping[str, object], *, num_classes: int, download: bool = False
) -> nn.Module:
    """The network, with random weights, or with timm's own where `download` is set.

    Raises UserError as `check_network` does; whatever timm raises passes.
    """
    check_network(name, options)
    return timm.create_model(name, pretrained=download, num_classes=num_classes, **options)  # type: ignore[arg-type]


def as_timm_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as timm or the network's authors publish them, under the names of `network`; those of
    a classifier that it lacks are left out. What fits neither way is left as it is.
    """
    own = network.state_dict()
    kept = _without_classifier(network, state)
    module = sys.modules[type(network).__module__]
    # Authors' names to timm's; not every module has it.
    convert = getattr(module, "checkpoint_filter_fn", None)
    fits = kept.keys() == own.keys() and all(kept[key].shape == own[key].shape for key in own)
    if convert and not fits:
        kept = _without_classifier(network, convert(dict(state), network))
    return kept


def _without_classifier(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    cfg: Any = network.pretrained_cfg
    names = cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    own = network.state_dict()
    return {key: tensor for key, tensor in state.items() if key in own or not key.startswith(heads)}

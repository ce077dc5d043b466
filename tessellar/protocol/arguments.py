"""What the numbers of a config may be, told by the names of arguments: one rule for each name, for
every class that a config may build.

A class checks what only it knows (that heads divide a width). What a name alone says is said here
once: that a width is a whole number of at least 1, a dropout a share, a weight of a loss neither
negative nor NaN. Checked after the constructor, whose own message tells more.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import Any, TypeVar

from tessellar.errors import UserError
from tessellar.protocol.ranges import check_number, check_whole

C = TypeVar("C", bound=type)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Whole numbers of at least 1.
SIZES = _words(
    """
    accumulate always batch_size caption_dim caption_length channels columns decoder_depth
    decoder_heads decoder_multipliers decoder_patch_size decoder_width depth dim encoder_depth
    encoder_heads encoder_width epoch_length every every_n_epochs every_n_updates ffn_hidden
    ffn_multiple_of group group_bits groups head_depth head_dim head_heads head_width hidden
    holistic image_size in_channels init_step keep kernel latent_dim length levels longest
    max_skipped min_tokens mlp_blocks mlp_dim multiple multipliers num_classes num_heads
    num_kv_heads num_res_blocks num_samples num_tokens patch patch_size phis pool repa_dim repeats
    restart_every samples semantic_dim semantic_layer shortest sides size split stages steps stride table
    text_dim text_hidden text_length text_vocab trained_steps val_length virtual_batch vision_dim
    vocab_size width window z_channels
    """
)
#: Whole numbers of at least 0.
COUNTS = _words(
    """
    adversarial_start blur bos buffer channel_order deep decoder_attention encoder_attention
    feature_steps first grace neighbours null_class num_workers pad restart_until seed shallow
    shift start tap warmup
    """
)
#: Numbers in [0, 1].
SHARES = _words(
    """
    attention_dropout betas condition_dropout crop cutout decay decay_start drop drop_path dropout final
    head_dropout label_smoothing least_masked max_corrupt muon_momentum null phi_ratio probability random_order
    rate val_share warmup_from warn_below
    """
)
#: Finite numbers of at least 0.
AMOUNTS = _words(
    """
    adversarial_weight alignment codebook_weight commitment_weight consistency discriminator_weight
    diversity entropy_weight eps feature_weight final_weight_decay gradient guidance kl_weight
    known_weight l1 l2 lr muon_lr norm_eps perceptual_weight prefix_weight proximity qk_norm_eps
    quantization_weight repa_weight repulsion sample_weight semantic_weight soft_clamp
    text_loss_weight threshold vision_loss vision_margin vision_weight weight weight_decay weights
    z_loss
    """
)
#: Finite numbers above 0.
POSITIVE = _words(
    """
    clip entropy_temperature inv_temperature max_timestep mlp_ratio ratio rope_base scale spread
    std temperature ten_ratios
    """
)
#: Any finite number.
SIGNED = _words("gate_init highest layers lowest mean mode_scale")
#: Where a class means something else by a name.
ELSEWHERE: Mapping[str, frozenset[str]] = {
    "AdaptiveWeight.lowest": AMOUNTS,
    "AdaptiveWeight.highest": AMOUNTS,
    "BlurDiscriminator.kernel": SIGNED,  # a filter, where the others' are sides
    "ContextNoise.end": SHARES,
    "DinoDiscriminator.layers": COUNTS,  # places of blocks; a VisionModel counts from the end, too
    "OrderAnnealing.end": COUNTS,
}
RULES: tuple[tuple[frozenset[str], Callable[[str, Any], None]], ...] = (
    (SIZES, functools.partial(check_whole, least=1)),
    (COUNTS, functools.partial(check_whole, least=0)),
    (SHARES, functools.partial(check_number, least=0, most=1)),
    (AMOUNTS, functools.partial(check_number, least=0)),
    (POSITIVE, functools.partial(check_number, above=0)),
    (SIGNED, check_number),
)


def rule_of(owner: type, name: str) -> Callable[[str, Any], None] | None:
    """What checks an argument of a class; None for a name that no list holds, and for classes of
    other packages, whose words are their own.
    """
    if owner.__module__.partition(".")[0] != __name__.partition(".")[0]:
        return None
    for made in owner.__mro__:
        known = ELSEWHERE.get(f"{made.__name__}.{name}")
        if known is not None:
            return next(rule for names, rule in RULES if names is known)
    return next((rule for names, rule in RULES if name in names), None)


def check_arguments(owner: type, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for a number out of its range, that of a name without a rule for NaN."""
    for name, value in arguments.items():
        rule = rule_of(owner, name)
        for number in _numbers(value):
            where = f"{name} of {owner.__name__}"
            if rule is not None:
                rule(where, number)
            elif not -inf <= number <= inf:  # so written, NaN is refused
                raise UserError(f"{where} is {number!r}; it must be a number")


def _numbers(value: Any) -> Iterator[int | float]:
    """The number that an argument is, or those of a sequence."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def in_ranges(cls: C) -> C:
    """Class decorator (outside of `dataclass`): its constructor refuses numbers out of their ranges."""
    init = cls.__init__

    @functools.wraps(init)
    def checking(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        given = {name: bound.arguments[name] for name in list(bound.arguments)[1:]}
        try:
            init(self, *args, **kwargs)
        except (ArithmeticError, IndexError, RuntimeError, TypeError):
            check_arguments(
                cls, given
            )  # a number may be why, and says more than a division by zero
            raise
        check_arguments(cls, given)

    cls.__init__ = checking
    return cls

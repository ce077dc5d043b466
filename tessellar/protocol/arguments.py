"""What the numbers of a config may be, told by the names of arguments: one rule for each name, or
for the last word of it (`decoder_depth` is a depth), for every class that a config may build.

A class that means something else by a name says so: `ranges = {"shift": POSITIVE}`, a ClassVar. It
checks what only it knows (that heads divide a width). What a name alone says is said here
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
    accumulate always batch_size bits blocks caption_dim channels classes columns decoder_multipliers depth
    dim drafts epoch_length every every_n_epochs every_n_updates group group_bits groups head_groups heads
    hidden holistic
    init_step keep kernel length levels longest max_skipped multiple multipliers
    num_samples ffn_multiple_of milestones patch phis pool repeats restart_every rows_at_once
    samples semantic_layer sets shortest sides size slots
    split stages steps stride table text_vocab tokens trained_steps virtual_batch width window
    """
)
#: Whole numbers of at least 0.
COUNTS = _words(
    """
    adversarial_start attention blur bos buffer channel_order deep decoder_attention encoder_attention
    feature_steps first grace mlp_blocks neighbours nested_after null_class num_workers pad restart_until seed shallow
    shift start tap warmup
    """
)
#: Numbers in [0, 1].
SHARES = _words(
    """
    betas crop cutout decay decay_start drop drop_path dropout final flip label_smoothing least_masked
    max_corrupt milestone_factor muon_momentum null phi_ratio probability random_order rate share warmup_from
    warn_below
    """
)
#: Finite numbers of at least 0.
AMOUNTS = _words(
    """
    alignment consistency diversity eps final_weight_decay gradient guidance l1 l2 lr muon_lr
    proximity repulsion soft_clamp threshold vision_loss vision_margin weight weight_decay weights
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
SIGNED = _words("gate_init gate_scale highest layers lowest mean mode_scale")
#: The words that rule a name which they end.
LAST_WORDS = _words(
    "blocks channels classes depth dim dropout eps heads hidden length size share slots tokens weight width"
)


def _check_count(name: str, value: Any, least: int) -> None:
    """Classes that take fractions under a name of a count say so by their annotations."""
    if isinstance(value, float):
        check_number(name, value, least=0)
    else:
        check_whole(name, value, least=least)


RULES: tuple[tuple[frozenset[str], Callable[[str, Any], None]], ...] = (
    (SIZES, functools.partial(_check_count, least=1)),
    (COUNTS, functools.partial(_check_count, least=0)),
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
        own = vars(made).get("ranges", {})
        if name in own:
            return next(rule for names, rule in RULES if names is own[name])
    last = name.rpartition("_")[2]
    words = (name, last) if last in LAST_WORDS else (name,)
    for word in words:
        for names, rule in RULES:
            if word in names:
                return rule
    return None


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

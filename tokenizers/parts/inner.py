"""Tokenizers inside of tokenizers: given as one, or as the path of one that is loaded."""

from tessellar.protocol.configured import refuse_outside
from tessellar.protocol.tokenizer import Tokenizer


def inner_tokenizer(
    outer: Tokenizer, given: Tokenizer | str, argument: str = "tokenizer"
) -> Tokenizer:
    """The tokenizer that `outer` was given as one of its arguments.

    The config of `outer` then holds it, not where it was: an export is complete in itself.
    """
    if not isinstance(given, str):
        return given
    from tessellar.checkpoints.reading import load_tokenizer

    refuse_outside(f"the {argument} of {type(outer).__name__}, {given}")
    loaded = load_tokenizer(given)
    outer._config[argument] = loaded.config
    return loaded

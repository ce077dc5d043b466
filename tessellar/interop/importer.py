"""What an `official.py` declares: one importer for each kind of file that its authors published.

    OFFICIAL = TokenizerImporter(what="a ReToK tokenizer", marks=..., entries=..., keys=KEYS,
    own=OWN, build=build)

`convert.py import` finds importers by their folders: `OFFICIAL` of
`tessellar/{models,tokenizers}/<paper>/official.py`, an importer or a tuple of them, and the same in
packages that `--package` names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.files import entry_of, sets_of_weights, state_dicts, unwrap
from tessellar.interop.keys import KeyTable, match_key, matches
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout
from tessellar.protocol.ranges import check_whole
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tensor_files import Weights

M = TypeVar("M", bound=nn.Module)
State = Mapping[str, Tensor]

FLAT: tuple[str, ...] = ()
"""Entries of a file that is itself the state dict."""


@dataclass(frozen=True)
class ImportOptions:
    """What the weights do not say: side of the images, attention heads (of a decoder: as many,
    unless `decoder_heads` says otherwise), and the name of a published variant.

    `file` is where the weights were read; a config may lie beside them.
    """

    image_size: int | None = None
    num_heads: int | None = None
    variant: str | None = None
    file: str | None = None
    decoder_heads: int | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_whole("--image-size", self.image_size, least=1, most=8192)
        if self.num_heads is not None:
            check_whole("--num-heads", self.num_heads, least=1, most=1024)
        if self.decoder_heads is not None:
            check_whole("--decoder-heads", self.decoder_heads, least=1, most=1024)
            if self.num_heads is None:
                raise UserError(
                    "--decoder-heads is for a decoder unlike its encoder: give --num-heads as well"
                )

    @property
    def heads(self) -> tuple[int, int] | None:
        """Of encoder and decoder, where they were given."""
        if self.num_heads is None:
            return None
        return self.num_heads, self.decoder_heads or self.num_heads


@dataclass(frozen=True)
class Buffers:
    """Where the buffers are that the evaluated entry lacks: an average often holds parameters
    alone.

    `names` are patterns of keys: a parameter is never taken from there.
    """

    entry: str
    names: tuple[str, ...]


def same_tensors(state: State) -> Mapping[str, Tensor]:
    """The state dict as it is."""
    return state


@dataclass(frozen=True, kw_only=True)
class Importer(Generic[M]):
    """One kind of official file, and how it becomes a module of ours.

    what: what it is, in messages, with its article ("a ReToK tokenizer")
    marks: patterns of keys; a state dict that holds all of them is of this kind
    entries: the entry of the file that the paper evaluates, then what else may be taken; FLAT where there are none
    keys: keys theirs <-> ours; a function of our module where they depend on its sizes; None where only a config that
        lies beside the file knows them, and `build` fills the module itself
    own: patterns of our tensors that no official file holds: counters, which stay as they were made
    split, join: inverse functions of a state dict, for tensors that are one there and several here
    buffers: where the buffers are, if not in the entry itself
    paper: the name that `convert.py import` takes (default: that of the folder)
    """

    what: str
    marks: tuple[str, ...]
    entries: tuple[str, ...]
    keys: KeyTable | Callable[[M], KeyTable] | None
    own: tuple[str, ...] = ()
    split: Callable[[State], State] = same_tensors
    join: Callable[[State], State] = same_tensors
    buffers: Buffers | None = None
    paper: str = ""

    def holds(self, state: State) -> bool:
        """Whether a state dict has all marks."""
        return not self._absent(state)

    def check(self, state: State) -> None:
        """Raise UserError where a state dict lacks a mark."""
        if absent := self._absent(state):
            raise UserError(
                f"these are not the weights of {self.what}: {', '.join(absent)} is absent"
            )

    def is_in(self, content: Any, where: str, key: str | None = None) -> bool:
        """Whether a file, or its entry `key`, holds weights of this kind: in any of its entries."""
        inner = content if key is None else entry_of(content, key, where)
        return any(self.holds(state) for state in sets_of_weights(inner))

    def read(self, content: Any, where: str, key: str | None = None) -> dict[str, Tensor]:
        """The state dict that the paper evaluates, or the entry `key`, with its buffers.

        Which of several was taken is said in one line.
        """
        state = unwrap(content, where, key, self.entries)
        if self.buffers is not None and self.buffers.entry in state_dicts(content):
            there = unwrap(content, where, self.buffers.entry)
            buffers = {}
            for name, tensor in there.items():
                if matches(name, self.buffers.names):
                    buffers[name] = tensor
            state = buffers | state
        return Weights(state, where)

    def fill(self, module: M, state: State, where: str = "") -> M:
        """An official state dict into a module of its sizes, strictly; in eval mode.

        Raises UserError that lists keys without a rule, and what is missing, unknown or misshapen.
        """
        where = where or f"the file of {self.what}"
        ours = self._table(module).from_official(self.split(state), where)
        load_strict(module, {**self._own(module), **ours}, where)
        return module.eval()

    def to_official(self, module: M) -> dict[str, Tensor]:
        """The official state dict of a module, without what no official file needs; the inverse of
        `fill`.
        """
        own = self._own(module)
        state = {name: tensor for name, tensor in module.state_dict().items() if name not in own}
        return dict(self.join(self._table(module).to_official(state, self.what)))

    def _absent(self, state: State) -> list[str]:
        return [mark for mark in self.marks if not _has(state, mark)]

    def _table(self, module: M) -> KeyTable:
        assert self.keys is not None, "keys that a config names: the module is filled by `build`"
        return self.keys if isinstance(self.keys, KeyTable) else self.keys(module)

    def _own(self, module: M) -> dict[str, Tensor]:
        own = {}
        for name, tensor in module.state_dict().items():
            if matches(name, self.own):
                own[name] = tensor
        return own


T = TypeVar("T", bound=Tokenizer)
G = TypeVar("G", bound=Generator)


@dataclass(frozen=True, kw_only=True)
class TokenizerImporter(Importer[T]):
    """`build(state, options)` reads sizes from shapes and gives the filled tokenizer."""

    build: Callable[[State, ImportOptions], T]


@dataclass(frozen=True, kw_only=True)
class GeneratorImporter(Importer[G]):
    """`build(state, layout, options)` gives the filled generator over a tokenizer's layout.

    `tokenizer` is the paper whose tokenizer it reads, where that is published under another name.
    """

    build: Callable[[State, Layout, ImportOptions], G]
    tokenizer: str = ""


def by_heads(from_official: Callable[..., G]) -> Callable[[State, Layout, ImportOptions], G]:
    """How a generator is built whose file tells all but the number of heads:
    `from_official(state, layout, num_heads)`.
    """

    def build(state: State, layout: Layout, options: ImportOptions) -> G:
        return from_official(state, layout, options.num_heads)

    return build


def _has(state: State, mark: str) -> bool:
    """Whether a key is like the mark; most marks are whole keys."""
    return mark in state or any(match_key(mark, key) is not None for key in state)

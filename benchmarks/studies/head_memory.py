"""Memory of a head by the number of codes: what reads a token and what predicts it, without running.

Generators are built on the meta device, whose tensors have sizes and no data, so that a softmax over
2^32 codes can be asked as well. Of each: parameters of the parts that depend on the code, and the
most bytes of activations that live at once while the head predicts one token of every image.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessellar.models.bar import BAR
from tessellar.models.bitdance import BitDance
from tessellar.models.llamagen import LlamaGen
from tessellar.models.mar import MAR
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.tokenbridge import TokenBridge
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Continuous,
    Factorized,
    Kind,
    grid_layout,
)

IMAGES = 64
SIDE = 8
BITS = (12, 18, 32)
# How a token's bits are divided: among two sub-tokens (18 as published), and among channels.
SUB_TOKENS = {12: (4, 8), 18: (6, 12), 32: (16, 16)}
CHANNELS = {12: (8,) * 4, 18: (8,) * 6, 32: (16,) * 8}


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensors made inside it that lived at once: `most`, read behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view shares its storage with what was given.
            if isinstance(leaf, Tensor) and _key(leaf) not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen[storage._cdata] = storage
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Parts:
    """Modules that depend on the code, and one evaluation of the head for a token of `IMAGES`."""

    modules: tuple[nn.Module, ...]
    predict: Callable[[], object]


def parts_of(generator: nn.Module, width: int) -> Parts:
    """What of a generator of the given width reads and predicts tokens; raises TypeError for others."""
    states = torch.empty(IMAGES, width, device="meta")
    whole = torch.zeros(IMAGES, 1, dtype=torch.int64, device="meta")
    time = torch.empty(IMAGES, device="meta")
    match generator:
        case LlamaGen():
            modules = (generator.token_embedding, generator.output)
            return Parts(modules, lambda: generator.output(states).float().softmax(-1))
        case OpenMAGVIT2AR():
            tokens = whole.expand(-1, len(generator.vocabs))
            rotations = generator.inside()
            modules = (generator.embeddings, generator.intra)
            return Parts(modules, lambda: generator.intra(states, tokens, rotations))
        case BAR():
            bits = whole.expand(-1, generator.bits)
            head = generator.bit_head
            return Parts((generator.embedding, head), lambda: head(states, bits, bits > 0, time))
        case BitDance():
            noisy = torch.empty(IMAGES, generator.area, generator.bits, device="meta")
            given = states[:, None].expand(-1, generator.area, -1)
            flow = generator.denoiser
            return Parts((generator.token_input, flow), lambda: flow(noisy, time, given))
        case TokenBridge():
            classes = whole.expand(-1, len(generator.channels.sizes))
            return Parts((generator.head,), lambda: generator.head(states, classes))
        case MAR():
            noisy = torch.empty(IMAGES, generator.channels, device="meta")
            return Parts((generator.head,), lambda: generator.head(noisy, time, states))
    raise TypeError(f"{type(generator).__name__} has no head that is known here")


def kind_of(generator: type[nn.Module], bits: int) -> Kind:
    """Tokens of 2^bits codes as a generator reads them; MAR's are four real numbers whatever the
    codes.
    """
    if generator is LlamaGen:
        return Categorical(2**bits)
    if generator is OpenMAGVIT2AR:
        return Factorized(tuple(2**size for size in SUB_TOKENS[bits]))
    if generator is TokenBridge:
        return Factorized(CHANNELS[bits])
    return Continuous(4) if generator is MAR else Bits(bits)


def head_memory(generator: type[Any], options: dict[str, Any], bits: int) -> dict[str, int]:
    """`parameters`, and `bytes` of activations at the peak in float32, of a generator's head at 2^bits
    codes; `options` are those that its config gives.
    """
    layout = grid_layout(SIDE, SIDE, kind_of(generator, bits))
    with torch.device("meta"):
        made = generator(layout, **options).eval()
    parts = parts_of(made, options["width"])
    peak = PeakBytes()
    with torch.no_grad(), peak:
        parts.predict()
    parameters = 0
    for module in parts.modules:
        parameters += sum(tensor.numel() for tensor in module.parameters())
    return {"parameters": parameters, "bytes": peak.most}

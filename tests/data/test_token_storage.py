import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessellar.data.token_cache.storage import (
    is_storage_of,
    pack,
    sample_posterior,
    storage_of,
    unpack,
)
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Continuous,
    Factorized,
    Layout,
    Segment,
    grid_layout,
)


@pytest.mark.parametrize(
    "kind, expected",
    [
        (Categorical(256), ("ids", "uint8", (6,))),
        (Categorical(257), ("ids", "uint16", (6,))),
        (Categorical(65_536), ("ids", "uint16", (6,))),
        (Categorical(65_537), ("ids", "uint32", (6,))),
        (Categorical(2**32), ("ids", "uint32", (6,))),
        (Factorized((16, 300)), ("ids", "uint16", (6, 2))),
        (Bits(9), ("bits", "uint8", (6, 2))),
        (Continuous(5), ("vectors", "float32", (6, 5))),
    ],
)
def test_tokens_take_the_smallest_type_that_holds_them(kind, expected):
    assert storage_of(grid_layout(2, 3, kind)) == expected


def test_the_largest_vocabulary_of_all_segments_counts():
    layout = Layout((Segment((2,), Categorical(10)), Segment((3,), Categorical(70_000))))
    assert storage_of(layout) == ("ids", "uint32", (5,))
    with pytest.raises(ValueError, match="does not fit into 32 bits"):
        storage_of(grid_layout(1, 1, Categorical(2**32 + 1)))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_unpacking_inverts_packing(data: st.DataObject):
    kind = data.draw(
        st.one_of(
            st.integers(1, 2**20).map(Categorical),
            st.lists(st.integers(1, 1000), min_size=1, max_size=4).map(
                lambda v: Factorized(tuple(v))
            ),
            st.integers(1, 40).map(Bits),
        )
    )
    layout = grid_layout(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), kind)
    blank = layout.blank(data.draw(st.integers(1, 3)))
    sizes = {
        Categorical: lambda k: k.vocab,
        Factorized: lambda k: torch.tensor(k.vocabs),
        Bits: lambda k: 2,
    }
    seed = data.draw(st.integers(0, 1000))
    draws = torch.rand(
        blank.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    tokens = (draws * sizes[type(kind)](kind)).long()
    storage = storage_of(layout)
    array = pack(tokens, storage)
    assert array.shape == (len(blank), *storage.shape) and array.dtype == np.dtype(storage.dtype)
    assert torch.equal(unpack(array, storage, layout), tokens)


def test_vectors_are_not_rounded_but_in_caches_of_earlier_versions():
    layout = grid_layout(2, 2, Continuous(3))
    tokens = torch.randn(5, 4, 3) * torch.logspace(-8, 8, 3)
    storage = storage_of(layout)
    back = unpack(pack(tokens, storage), storage, layout)
    assert back.dtype == torch.float32 and torch.equal(back, tokens)
    older = storage._replace(dtype="uint16")
    assert is_storage_of(storage, layout) and is_storage_of(older, layout)
    assert not is_storage_of(older._replace(kind="ids"), layout)
    assert not is_storage_of(older, grid_layout(2, 2, Continuous(4)))
    assert torch.equal(unpack(pack(tokens, older), older, layout), tokens.bfloat16().float())


def test_a_posterior_is_sampled_around_its_mean():
    layout = grid_layout(2, 2, Continuous(3))
    storage = storage_of(layout, posterior=True)
    mean, std = torch.randn(2, 4, 3).bfloat16().float(), torch.rand(2, 4, 3).bfloat16().float()
    halves = unpack(pack(torch.cat([mean, std], -1), storage), storage, layout)
    assert torch.equal(sample_posterior(halves, torch.zeros(2, 12)), mean)
    noise = np.random.default_rng(0).standard_normal((2, 12))
    expected = mean + std * torch.from_numpy(noise).float().reshape(2, 4, 3)
    assert torch.equal(sample_posterior(halves, torch.from_numpy(noise)), expected)

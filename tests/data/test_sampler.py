import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from tessellar.data.sampler import ResumableSampler

lengths, worlds = st.integers(1, 60), st.integers(1, 5)


def ranks(length: int, world: int, **options) -> list[ResumableSampler]:
    return [
        ResumableSampler(range(length), rank=r, world_size=world, **options) for r in range(world)
    ]


@given(lengths, worlds, st.integers(0, 3), st.booleans())
def test_every_sample_comes_exactly_once_an_epoch(
    length: int, world: int, epoch: int, shuffle: bool
):
    samplers = ranks(length, world, shuffle=shuffle)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    drawn = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(d) for d in drawn]
    assert sorted(sum(drawn, [])) == list(range(length))


@given(lengths, worlds)
def test_drop_last_makes_ranks_equally_long_without_repeats(length: int, world: int):
    drawn = [list(sampler) for sampler in ranks(length, world, drop_last=True)]
    assert {len(d) for d in drawn} == {length // world}
    assert len(set(sum(drawn, []))) == world * (length // world)


@given(lengths, worlds, worlds, st.data())
def test_another_number_of_ranks_continues_after_the_samples_that_were_seen(
    length, before, after, data
):
    rounds = data.draw(st.integers(0, length // before))
    samplers = ranks(length, before, seed=7)
    iterators = [iter(sampler) for sampler in samplers]
    seen = [next(iterator) for _ in range(rounds) for iterator in iterators]
    resumed = ranks(length, after, seed=7)
    for sampler in resumed:
        sampler.load_state_dict(
            samplers[0].state_dict()
            if rounds
            else {"epoch": 0, "start": 0, "seed": 7, "length": length}
        )
    rest = [list(sampler) for sampler in resumed]
    assert sorted(seen + sum(rest, [])) == list(range(length))
    assert (
        seen + [rest[i % after][i // after] for i in range(length - len(seen))]
        == ResumableSampler(range(length), seed=7).order().tolist()
    )


def test_a_step_of_several_ranks_covers_what_one_process_would_take():
    alone = list(ResumableSampler(range(48), seed=1))
    first, second = (list(s) for s in ranks(48, 2, seed=1))
    for step in range(4):
        together = first[6 * step : 6 * step + 6] + second[6 * step : 6 * step + 6]
        assert sorted(together) == sorted(alone[12 * step : 12 * step + 12])


def test_the_order_is_another_one_each_epoch_and_the_same_again_for_a_seed():
    sampler = ResumableSampler(range(100), seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first == list(ResumableSampler(range(100), seed=0))
    assert first != list(ResumableSampler(range(100), seed=1)) and first != list(range(100))


def test_a_start_holds_for_one_pass_and_is_forgotten_in_another_epoch():
    sampler = ResumableSampler(range(10), shuffle=False)
    sampler.seek(epoch=2, start=7)
    sampler.set_epoch(2)
    assert len(sampler) == 10 and list(sampler) == [7, 8, 9] and list(sampler) == list(range(10))
    sampler.seek(epoch=2, start=7)
    sampler.set_epoch(3)
    assert list(sampler) == list(range(10))


def test_a_partial_pass_does_not_move_the_next_one():
    sampler = ResumableSampler(range(10), shuffle=False)
    iterator = iter(sampler)
    assert [next(iterator) for _ in range(4)] == [0, 1, 2, 3]
    assert sampler.state_dict()["start"] == 4
    assert list(sampler) == list(range(10))


def test_the_epoch_reaches_the_data_set():
    class Data(list):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Data(range(3))
    ResumableSampler(data).set_epoch(5)
    assert data.epoch == 5


def test_states_of_other_data_and_wrong_positions_are_refused():
    sampler = ResumableSampler(range(10), seed=1)
    with pytest.raises(ValueError, match="length.*11"):
        sampler.load_state_dict(ResumableSampler(range(11), seed=1).state_dict())
    with pytest.raises(ValueError, match="seed.*2"):
        sampler.load_state_dict(ResumableSampler(range(10), seed=2).state_dict())
    with pytest.raises(ValueError, match="start is 11"):
        sampler.seek(0, 11)
    with pytest.raises(ValueError, match="rank is 2"):
        ResumableSampler(range(10), rank=2, world_size=2)


def test_lightning_would_not_replace_it():
    assert isinstance(ResumableSampler(range(3)), DistributedSampler)

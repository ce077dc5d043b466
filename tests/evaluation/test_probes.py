"""Probes on toy data whose answer is known."""

import pytest
import torch

from tessellar.errors import UserError
from tessellar.evaluation.probing import (
    CaptionVectors,
    Features,
    ProbeProtocol,
    accuracies,
    purities,
    retrieval,
    trained_head,
)
from tessellar.measures.probes import (
    chosen_penalty,
    neighbour_classes,
    ranks,
    ridge,
    ridge_classes,
    standard_of,
)
from tessellar.protocol.layout import Categorical, sequence_layout


def test_ridge_solves_its_normal_equations() -> None:
    x = torch.randn(40, 3, dtype=torch.float64)
    y = torch.randn(40, 2, dtype=torch.float64)
    fitted = ridge(x, y, penalty=0.3)
    gradient = x.T @ (fitted(x) - y) / 40 + 0.3 * fitted.weight
    assert gradient.abs().max() < 1e-12
    assert (fitted(x) - y).mean(0).abs().max() < 1e-12  # the bias is not penalised
    exact = x @ torch.randn(3, 2, dtype=torch.float64) + 5
    assert torch.allclose(ridge(x, exact, penalty=0.0)(x), exact)


def test_the_penalty_is_chosen_on_every_tenth_vector() -> None:
    x = torch.randn(200, 170, dtype=torch.float64)  # of noise, 180 vectors fit nearly all
    clean = x @ torch.randn(170, 1, dtype=torch.float64)
    noise = torch.randn(200, 1, dtype=torch.float64)
    assert chosen_penalty(x, clean, (1e-6, 100.0)) == 1e-6
    assert chosen_penalty(x, noise, (1e-6, 100.0)) == 100.0


def test_a_number_that_never_varies_counts_for_nothing() -> None:
    vectors = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    standard = standard_of(vectors)
    assert torch.equal(standard(vectors), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double())
    assert torch.equal(standard(torch.tensor([[2.0, 99.0]])), torch.zeros(1, 2).double())
    with pytest.raises(UserError, match="a feature has 9000 numbers"):
        standard_of(torch.zeros(2, 9000))


def test_linear_and_neighbour_probes_tell_apart_what_can_be() -> None:
    labels = torch.arange(300) % 3
    centres = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    train = centres[labels] + 0.3 * torch.randn(300, 3)
    test = centres[labels] + 0.3 * torch.randn(300, 3)
    linear = ridge_classes(train, labels, test, 3, (1e-3, 1.0))
    near = neighbour_classes(train, labels, test, 3, count=5, temperature=0.07)
    assert torch.equal(linear, labels) and torch.equal(near, labels)


def test_neighbours_vote_with_their_similarity() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    asked = torch.tensor([[2.0, 0.0]])
    # exp(1 / t) against 2 exp(0.6 / t): equal at t = 0.4 / log 2 = 0.577.
    for temperature, expected in ((0.5, 0), (0.7, 1)):
        found = neighbour_classes(train, labels, asked, 2, count=3, temperature=temperature)
        assert found.tolist() == [expected]


def test_ranks_count_wrong_candidates_before_the_first_right_one() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 4.0], [0.0, 1.0, 1.0]])
    assert ranks(scores, torch.tensor([0, 1, 2])).tolist() == [0, 2, 1]
    assert ranks(scores, torch.tensor([0, 1, 1])).tolist() == [0, 1, 0]


def test_trained_probes_reach_the_answer_and_repeat_by_their_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=generator)
    vectors = torch.randn(256, 4, 3, generator=generator)
    vectors[:, 2, 0] = 4.0 * labels - 2  # only the third position tells, by its first channel
    features = Features(vectors, labels)
    protocol = ProbeProtocol(epochs=30, lr=0.02, batch_size=64, heads=2)
    assert accuracies("attentive", features, features, protocol) == [1.0]
    assert accuracies("softmax", features, features, protocol)[0] > 0.75
    heads = []
    for seed in (1, 1, 2):
        chance = torch.Generator().manual_seed(seed)
        heads.append(trained_head(True, features, 2, ProbeProtocol(epochs=1), chance).state_dict())
    assert torch.equal(heads[0]["keys.weight"], heads[1]["keys.weight"])
    assert not torch.equal(heads[0]["keys.weight"], heads[2]["keys.weight"])


def test_flat_pooling_sees_positions_that_the_mean_does_not() -> None:
    labels = torch.arange(200) % 2
    vectors = torch.zeros(200, 2, 1)
    vectors[torch.arange(200), labels] = 1.0  # equal means, other places
    features = Features(vectors, labels)
    flat = accuracies("linear", features, features, ProbeProtocol(pooling="flat"))
    mean = accuracies("linear", features, features, ProbeProtocol(pooling="mean"))
    assert flat == [1.0] and mean == [0.5]


def test_purity_of_codes_against_shuffled_labels() -> None:
    labels = torch.arange(400) % 4
    tokens = torch.stack([labels, torch.zeros_like(labels)], dim=1)
    found = purities(tokens, labels, sequence_layout(2, Categorical(4)), seed=0)
    assert found.by_position.share == pytest.approx((1 + 0.25) / 2)
    assert found.by_position.information == pytest.approx(0.5)
    assert found.whole.share == pytest.approx(
        (300 + 200) / 800
    )  # code 0 is of class 0 in 200 of 500
    assert found.shuffled_by_position.information < 0.02


def test_captions_are_found_by_images_and_images_by_captions() -> None:
    colours = ("red", "green", "blue", "grey")
    number = torch.arange(80) % 4
    captions = [f"A {colours[i]} thing, {i}." for i in number.tolist()]
    vectors = torch.nn.functional.one_hot(number, 4) + 0.01 * torch.randn(80, 4)
    found = retrieval(vectors, captions, vectors[:8], captions[:8], penalties=(1e-3,))
    assert found.texts == found.images == (1.0, 1.0, 1.0) and found.candidates == 8
    wrong = retrieval(vectors, captions, vectors[1:9], captions[:8], penalties=(1e-3,))
    assert wrong.texts[0] == wrong.images[0] == 0.0


def test_words_of_captions_weigh_by_their_rarity() -> None:
    vectors = CaptionVectors(["A cat", "a dog", "a DOG!"])
    cat, dog, strange = vectors(["cat a", "dog, dog", "whale"])
    assert strange.abs().sum() == 0 and dog.count_nonzero() == 1
    assert cat[vectors.places["cat"]] > cat[vectors.places["a"]] > 0
    with pytest.raises(UserError, match="no words"):
        CaptionVectors(["!?", ""])

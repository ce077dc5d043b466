"""Facts of the published networks."""

from tessellar.data.sets.fashion_mnist import CLASS_NAMES
from tessellar.data.sets.shapes import SHAPES
from tessellar.networks.facts import PUBLISHED


def test_class_names_of_the_published_networks_are_those_of_their_data_sets():
    names = {facts.name: facts.class_names for facts in PUBLISHED.values()}
    assert names == {"fmnist-resnet10t": CLASS_NAMES, "shapes-test_resnet": tuple(SHAPES)}

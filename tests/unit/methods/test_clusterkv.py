import pytest
import torch

from kvservice.compression.protocols import CLUSTER_INDEXES
from kvservice.methods import clusterkv


@pytest.fixture
def method():
    return CLUSTER_INDEXES.get("clusterkv")


def bundles(rows, sizes, dim, spread=0.05):
    """Keys in bundles of one direction each but of many lengths, in a shuffled order, and the bundle of each."""
    truth = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    truth = truth[torch.randperm(len(truth))]
    directions = torch.nn.functional.normalize(torch.randn(rows, len(sizes), dim), dim=-1)
    lengths = 0.5 + 4 * torch.rand(rows, len(truth), 1)
    return lengths * directions[:, truth] + spread * torch.randn(rows, len(truth), dim), truth


def test_one_step_is_that_of_the_paper():
    """By hand: a key goes to the greatest cosine, whatever product and distance are; means are of raw keys."""
    keys = torch.tensor([[[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [1.0, 4.0]]])
    centroids = torch.tensor([[[0.1, 0.0], [3.0, 9.0], [-1.0, -1.0]]])
    labels = clusterkv._nearest(keys, centroids)
    assert labels.tolist() == [[0, 0, 1, 1]]
    means = clusterkv._means(keys, labels, centroids)
    assert means.tolist() == [[[5.0, 0.5], [0.5, 3.0], [-1.0, -1.0]]], "an empty cluster stays where it is"


def test_keys_of_one_direction_come_together_whatever_their_length(method):
    torch.manual_seed(0)
    keys, truth = bundles(2, [40] * 4, 16)
    labels, centroids = method.cluster(keys, 12, seed=1)
    assert centroids.shape == (2, 12, 16)
    for row in range(2):
        for label in labels[row].unique():
            assert truth[labels[row] == label].unique().numel() == 1


def test_it_is_a_function_of_keys_and_seed(method):
    torch.manual_seed(0)
    keys = torch.randn(3, 200, 16)
    torch.manual_seed(1)
    first, again, other = (method.cluster(keys, 9, seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    alone = method.cluster(keys.clone(), 9, 5)
    assert torch.equal(first[1], alone[1])


def test_centroids_are_the_means_of_their_keys_once_nothing_moves(method):
    torch.manual_seed(0)
    keys, _ = bundles(1, [50] * 3, 16)
    labels, centroids = method.cluster(keys, 3, seed=2)
    for label in labels.unique():
        torch.testing.assert_close(centroids[0, label], keys[0][labels[0] == label].mean(0))


def test_fewer_keys_than_clusters_leave_some_empty(method):
    labels, centroids = method.cluster(torch.randn(2, 3, 16), 8, seed=0)
    assert labels.max() < 8
    assert centroids.isfinite().all()


def test_clusters_are_ranked_by_the_raw_product(method):
    centroids = torch.tensor([[[1.0, 0.0], [3.0, 3.0]]])
    assert method.scores(torch.tensor([[[2.0, 0.0]]]), centroids).tolist() == [[[2.0, 6.0]]]


def test_keys_of_another_dtype_give_centroids_of_it(method):
    assert method.cluster(torch.randn(1, 64, 16).bfloat16(), 2, seed=0)[1].dtype is torch.bfloat16

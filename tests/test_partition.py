"""Every kind of partition gives every example to exactly one client, and what its name promises beside."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank.config.sections import PARTITIONS, PartitionConfig
from anyrank.data.partition import Shards, _proportional, partition
from anyrank.errors import DataError

SPLITS = tuple(kind for kind in PARTITIONS if kind != "sampled")  # in which every example goes to exactly one client


def labels_of(counts):
    """Labels `[n]`, shuffled, with `counts[l]` examples of label l."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(0).permutation(labels)


def table(shards, labels):
    """Examples of each label at each client, `[clients, labels]`."""
    return np.array([np.bincount(labels[shard], minlength=labels.max() + 1) for shard in shards])


def config(kind, **options):
    return PartitionConfig(kind=kind, column="site" if kind == "column" else "", **options)


# --- what holds of every kind ----------------------------------------------------------------------------------------


@st.composite
def splits(draw):
    """A partition that can be made: `(config, labels, clients, columns)`."""
    counts = draw(st.lists(st.integers(1, 40), min_size=2, max_size=8))
    labels = labels_of(counts)
    clients = draw(st.integers(1, min(len(labels), 30)))
    kind = draw(st.sampled_from(SPLITS))
    at_least = -(-len(counts) // clients)  # labels a client, so that every label is held
    k = draw(st.integers(at_least, len(counts)))
    alpha = draw(st.sampled_from([0.01, 0.1, 0.5, 1.0, 100.0]))
    sites = np.array([f"site-{i % clients}" for i in range(len(labels))], dtype=object)
    return config(kind, alpha=alpha, labels_per_client=k, min_examples=0), labels, clients, {"site": sites}


@given(splits(), st.integers(0, 2**31))
def test_every_example_goes_to_one_client_and_the_seed_decides(split, seed):
    how, labels, clients, columns = split
    shards = partition(how, labels, clients, seed, columns)
    assert len(shards) == clients
    assert sorted(np.concatenate(list(shards)).tolist()) == list(range(len(labels)))  # disjoint and complete
    for shard in shards:
        assert shard.dtype == np.int64
        assert (np.diff(shard) > 0).all()
    assert shards.sizes.tolist() == [len(shard) for shard in shards]
    again = partition(how, torch.from_numpy(labels), clients, seed, columns)  # tensors do as well
    assert (again.order == shards.order).all()
    assert (again.offsets == shards.offsets).all()


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "staircase", "quantity"])
def test_another_seed_gives_another_split(kind):
    labels = labels_of([60] * 5)
    one, other = (partition(config(kind, alpha=1.0), labels, 10, seed) for seed in (0, 1))
    assert (one.order != other.order).any()


@pytest.mark.parametrize("kind", SPLITS)
def test_more_clients_than_examples_is_refused(kind):
    with pytest.raises(DataError, match=r"clients.count = 5: more clients than the 4 training examples"):
        partition(config(kind, min_examples=0), labels_of([2, 2]), 5, 0, {"site": np.array(list("abcd"), dtype=object)})


def test_shards_are_views_that_cannot_be_written():
    shards = Shards.of_owners(np.array([1, 0, 1]), 3)
    with pytest.raises(ValueError, match="read-only"):
        shards[1][0] = 7
    with pytest.raises(IndexError, match="client 3"):
        shards[3]
    assert shards[2].tolist() == []


def test_ten_thousand_clients_are_two_arrays_and_a_moment():
    labels = labels_of([260] * 77)
    for kind in ("iid", "dirichlet", "pathological", "staircase", "quantity"):
        start = time.process_time()
        shards = partition(config(kind, min_examples=0), labels, 10_000, 0)
        assert time.process_time() - start < 5
        assert shards.order.nbytes + shards.offsets.nbytes == 8 * (len(labels) + 10_001)


# --- the kinds -------------------------------------------------------------------------------------------------------


def test_iid_sizes_differ_by_at_most_one():
    shards = partition(config("iid"), labels_of([50, 53]), 10, 3)
    assert sorted(shards.sizes.tolist()) == [10] * 7 + [11] * 3


@pytest.mark.parametrize("clients", [4, 50])
def test_dirichlet_of_large_alpha_is_near_iid(clients):
    labels = labels_of([1000] * 5)
    counts = table(partition(config("dirichlet", alpha=1e6), labels, clients, 0), labels)
    assert abs(counts - 1000 / clients).max() <= 1 + 0.02 * 1000 / clients


def test_dirichlet_of_large_alpha_leaves_nobody_out_where_labels_are_rarer_than_clients():
    # 40 labels of 50 examples over 100 clients: each label reaches half of them, and another half each time.
    labels = labels_of([50] * 40)
    shards = partition(config("dirichlet", alpha=1e6), labels, 100, 0)
    assert shards.sizes.min() >= 8  # 20 on average
    holders = {tuple(np.flatnonzero(column)) for column in table(shards, labels).T}
    assert len(holders) == 40


def test_rounding_keeps_proportions_in_expectation():
    class Given:
        """A generator whose Dirichlet proportions are .6 and .4, in that order."""

        def __init__(self):
            self.random = np.random.default_rng(0).random

        def dirichlet(self, alpha):
            return np.array([0.6, 0.4])

        def permutation(self, clients):
            return np.arange(clients)

    rng = Given()
    for number in (1, 3):  # neither divides into .6 and .4
        counts = [np.bincount(_proportional(1.0, 2, number, rng), minlength=2) for _ in range(4000)]
        assert np.mean(counts, axis=0) == pytest.approx([0.6 * number, 0.4 * number], abs=0.03)


def test_dirichlet_of_small_alpha_puts_most_of_a_label_on_one_client():
    labels = labels_of([500] * 10)
    counts = table(partition(config("dirichlet", alpha=0.01, min_examples=0), labels, 10, 0), labels)
    assert np.median(counts.max(axis=0)) > 400


def test_dirichlet_proportions_have_the_distributions_mean_and_variance():
    # p of one client ~ Beta(a, (K-1)a): mean 1/K, variance (1/K)(1-1/K)/(K·a+1)
    alpha, clients, labels = 0.5, 5, labels_of([400] * 20)
    drawn = [table(partition(config("dirichlet", alpha=alpha), labels, clients, seed), labels) / 400 for seed in range(40)]
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.mean(drawn) == pytest.approx(1 / clients)
    assert np.var(drawn) == pytest.approx(expected, rel=0.08)


def test_sizes_are_drawn_again_until_nobody_falls_short():
    labels = labels_of([20] * 10)
    short = config("dirichlet", alpha=0.1, min_examples=0)
    first = [partition(short, labels, 20, seed).sizes.min() for seed in range(30)]
    assert min(first) == 0  # so some seeds do draw again below
    for seed in range(30):
        assert partition(dataclasses.replace(short, min_examples=1), labels, 20, seed).sizes.min() >= 1


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_a_split_that_cannot_be_names_client_size_and_mend(kind):
    with pytest.raises(DataError) as caught:
        partition(config(kind, alpha=0.01, min_examples=10), labels_of([50] * 4), 20, 0)
    said = str(caught.value)
    assert "leaves client" in said
    assert "with 0 examples, expected at least 10; raise data.partition.alpha, lower clients.count" in said
    assert "\n" not in said


def test_pathological_clients_hold_k_labels_and_labels_are_held_evenly():
    labels = labels_of([120] * 10)
    counts = table(partition(config("pathological", labels_per_client=3), labels, 20, 0), labels)
    assert ((counts > 0).sum(axis=1) == 3).all()
    assert ((counts > 0).sum(axis=0) == 6).all()  # 20 clients x 3 labels / 10 labels
    assert set(counts[counts > 0]) == {20}  # 120 shared by 6


def test_pathological_pairs_labels_in_many_ways():
    labels = labels_of([40] * 10)
    counts = table(partition(config("pathological"), labels, 40, 0), labels)
    assert len({tuple(np.flatnonzero(row)) for row in counts}) > 20  # of 45 pairs


def test_pathological_labels_that_nobody_could_hold_are_refused():
    with pytest.raises(DataError, match=r"3 clients of 2 labels cannot hold all 10 labels; raise .* to 4"):
        partition(config("pathological"), labels_of([9] * 10), 3, 0)
    with pytest.raises(DataError, match="has only 3 labels"):
        partition(config("pathological", labels_per_client=4), labels_of([9] * 3), 3, 0)


def test_staircase_of_as_many_clients_as_labels_is_rblas():
    # RBLA's KMNIST table: label l of ten has 6000 examples, shared by the 10 - l clients l … 9.
    labels = labels_of([6000] * 10)
    counts = table(partition(config("staircase"), labels, 10, 0), labels)
    assert [np.flatnonzero(row).tolist() for row in counts] == [list(range(i + 1)) for i in range(10)]
    for label, share in enumerate([600, 667, 750, 857, 1000, 1200, 1500, 2000, 3000, 6000]):
        assert abs(counts[label:, label] - share).max() <= 1


def test_staircase_of_other_numbers_rises_by_ceilings():
    labels = labels_of([40] * 10)
    counts = table(partition(config("staircase"), labels, 4, 0), labels)
    assert (counts > 0).sum(axis=1).tolist() == [3, 5, 8, 10]  # ceil((i + 1) * 10 / 4)
    few = table(partition(config("staircase"), labels_of([30, 30]), 5, 0), labels_of([30, 30]))
    assert (few > 0).sum(axis=1).tolist() == [1, 1, 2, 2, 2]  # ceil((i + 1) * 2 / 5)


def test_quantity_skews_sizes_and_not_labels():
    labels = labels_of([2000] * 4)
    shards = partition(config("quantity", alpha=0.3), labels, 8, 0)
    assert shards.sizes.max() > 3 * shards.sizes.min()
    largest = int(shards.sizes.argmax())
    assert abs(table(shards, labels)[largest] / shards.sizes[largest] - 0.25).max() < 0.05


def test_a_column_gives_one_client_a_value_in_order():
    sites = np.array(["b", "a", "10", "b", "9"], dtype=object)
    shards = partition(config("column"), np.zeros(5, dtype=int), 4, 0, {"site": sites})
    assert [shard.tolist() for shard in shards] == [[2], [4], [1], [0, 3]]  # 10, 9, a, b: by the alphabet
    numbers = partition(config("column"), np.zeros(3, dtype=int), 3, 0, {"site": np.array(["10", "9", "2"], dtype=object)})
    assert [shard.tolist() for shard in numbers] == [[2], [1], [0]]  # 2, 9, 10: by value


def test_more_values_than_clients_are_dealt_round():
    shards = partition(config("column"), np.zeros(5, dtype=int), 2, 0, {"site": np.array(list("abcde"), dtype=object)})
    assert [shard.tolist() for shard in shards] == [[0, 2, 4], [1, 3]]


def test_columns_that_do_not_fit_are_refused():
    sites = {"site": np.array(["a", "a", "b"], dtype=object)}
    with pytest.raises(DataError, match=r"column 'site' has only 2 distinct values; set clients.count to 2 or less"):
        partition(config("column"), np.zeros(3, dtype=int), 3, 0, sites)
    with pytest.raises(DataError, match="did you mean 'sites'"):
        partition(config("column"), np.zeros(3, dtype=int), 2, 0, {"sites": sites["site"]})
    with pytest.raises(DataError, match="no columns beside text and label"):
        partition(config("column"), np.zeros(3, dtype=int), 2, 0)
    with pytest.raises(DataError, match="1 examples have no value"):
        partition(config("column"), np.zeros(3, dtype=int), 2, 0, {"site": np.array(["a", "", "b"], dtype=object)})


# --- sampled ---------------------------------------------------------------------------------------------------------


def test_a_million_clients_cost_what_one_does() -> None:
    """Nothing is made until it is asked for, and then for that client alone; asked again, it is the same."""
    labels = np.arange(200) % 10
    shards = partition(PartitionConfig(kind="sampled", examples_per_client=12, alpha=0.3), labels, 1_000_000, seed=1)
    assert len(shards) == 1_000_000
    own = shards[987_654]
    assert len(own) == len(set(own.tolist())) == 12
    assert own.tolist() == sorted(own.tolist())
    np.testing.assert_array_equal(shards[987_654], own)
    assert shards[987_653].tolist() != own.tolist()
    assert shards.sizes.sum() == 12_000_000


def test_sampled_labels_are_as_skewed_as_alpha_says() -> None:
    """At alpha 0.05 most clients see one or two labels, at alpha 1000 nearly all ten of them."""
    labels = np.arange(5000) % 10
    seen = {}
    for alpha in (0.05, 1000.0):
        shards = partition(PartitionConfig(kind="sampled", examples_per_client=40, alpha=alpha), labels, 200, seed=1)
        seen[alpha] = np.mean([len(np.unique(labels[shards[client]])) for client in range(200)])
    assert seen[0.05] < 3
    assert seen[1000.0] > 9


def test_a_rare_label_runs_out_and_others_fill_up() -> None:
    """Two labels, one with a single example: a client of 5 has 5 different ones all the same."""
    shards = partition(PartitionConfig(kind="sampled", examples_per_client=5, alpha=0.01), np.array([0] * 9 + [1]), 50, seed=0)
    assert all(len(set(shards[client].tolist())) == 5 for client in range(50))


def test_more_examples_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(DataError, match="the data has 10 training examples"):
        partition(PartitionConfig(kind="sampled", examples_per_client=11), np.zeros(10, dtype=int), 3, seed=0)

"""Collapse figures: small spectra by hand, and against the dense update."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import spectra

# Two layers: energies 9 + 4 + 1 = 14 and 4 + 1 + 1 = 6; 20 in all.
SPECTRA = {"a": torch.tensor([3.0, 2.0, 1.0]), "b": torch.tensor([2.0, 1.0, 1.0])}


def test_energy_beyond_is_the_share_past_the_smallest_rank_over_all_layers():
    assert spectra.energy_beyond(SPECTRA, 1) == pytest.approx((4 + 1 + 1 + 1) / 20)
    assert spectra.energy_beyond(SPECTRA, 2) == pytest.approx((1 + 1) / 20)
    assert spectra.energy_beyond(SPECTRA, 3) == 0.0


def test_each_partition_has_its_share_and_together_they_have_all():
    assert spectra.partition_energy(SPECTRA, [1, 3]) == pytest.approx([13 / 20, 7 / 20])
    assert spectra.partition_energy(SPECTRA, [3, 1, 1, 3]) == pytest.approx([13 / 20, 7 / 20])  # levels, in any order
    assert sum(spectra.partition_energy(SPECTRA, [1, 2, 3])) == pytest.approx(1.0)


def test_what_lies_past_the_first_partition_is_the_energy_beyond_it():
    first, *others = spectra.partition_energy(SPECTRA, [1, 2, 3])
    assert sum(others) == pytest.approx(spectra.energy_beyond(SPECTRA, 1))
    assert first == pytest.approx(1 - spectra.energy_beyond(SPECTRA, 1))


def test_effective_rank_of_equal_directions_is_their_number():
    assert spectra.effective_rank({"a": torch.ones(5)}) == pytest.approx(5.0)
    assert spectra.effective_rank({"a": torch.tensor([7.0, 0.0, 0.0])}) == pytest.approx(1.0)


def test_effective_rank_by_hand():
    # sigma^2 = 3, 1: shares 3/4 and 1/4, H = 3/4 ln(4/3) + 1/4 ln 4.
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert spectra.effective_rank({"a": torch.tensor([math.sqrt(3.0), 1.0])}) == pytest.approx(math.exp(entropy))


def test_layers_count_by_their_energy():
    # Layer a: one direction, energy 9. Layer b: two equal directions, energy 1. 0.9 * 1 + 0.1 * 2 = 1.1.
    values = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.5, 0.5]).sqrt()}
    assert spectra.effective_rank(values) == pytest.approx(1.1)


def test_no_energy_gives_zeros_and_no_division_by_zero():
    nothing = {"a": torch.zeros(3)}
    assert spectra.energy_beyond(nothing, 1) == 0.0
    assert spectra.partition_energy(nothing, [1, 3]) == [0.0, 0.0]
    assert spectra.effective_rank(nothing) == 0.0
    one_dead = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert spectra.effective_rank(one_dead) == pytest.approx(2.0)


@given(seed=st.integers(0, 9999), rank=st.integers(1, 6), scaling=st.floats(0.05, 50))
def test_spectra_of_an_adapter_are_those_of_what_its_layers_apply(seed, rank, scaling):
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 7, generator=draw, dtype=torch.float64)
    B = torch.randn(5, rank, generator=draw, dtype=torch.float64)
    found = spectra.spectra(Adapter({"z": LoraLayer(A, B, scaling), "a": LoraLayer(A, 2 * B, scaling)}))
    expected = np.linalg.svd(scaling * B.numpy() @ A.numpy(), compute_uv=False)[: min(rank, 5)]
    assert list(found) == ["a", "z"]
    np.testing.assert_allclose(found["z"], expected, atol=1e-10 * scaling * 50)
    np.testing.assert_allclose(found["a"], 2 * expected, atol=1e-10 * scaling * 50)


def test_collapse_figures_do_not_depend_on_the_size_of_the_update():
    grown = {name: 1e3 * values for name, values in SPECTRA.items()}
    assert spectra.energy_beyond(grown, 1) == pytest.approx(spectra.energy_beyond(SPECTRA, 1))
    assert spectra.effective_rank(grown) == pytest.approx(spectra.effective_rank(SPECTRA))

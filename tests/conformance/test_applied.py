"""What each client will apply equals the share of the dense definition, through PEFT's own forward pass."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ClientUpdate, Download
from anyrank.methods import REGISTRY, make
from conformance.dense import DEFINITIONS, Held, Upload
from conformance.world import (
    CONV,
    EQUAL,
    FC,
    MIXED,
    VARIANTS,
    Case,
    World,
    after_one_round,
    after_rounds,
    changes,
    label,
    turns,
    updates_of,
)

# At the ends of its range, tau makes other methods of one.
TAUS = [make("stayput", {"tau": tau, "true_point": on, "rotate": on}) for tau in (0.0, 1.0) for on in (False, True)]
DEFINED = [method for method in (*VARIANTS, *TAUS) if method.name in DEFINITIONS]
IMAGES = torch.randn(3, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """A convolution, a linear layer and a head, of the shapes that the worlds have; nothing in it is square."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Module()
        self.body.conv = nn.Conv2d(3, 9, (2, 3), stride=(1, 2), padding=(1, 0))
        self.body.fc = nn.Linear(9, 11)
        self.head = nn.Linear(11, 4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body.fc(torch.tanh(self.body.conv(x)).mean(dim=(2, 3)))))


def with_weights(change: dict[str, np.ndarray], head: dict[str, np.ndarray] | None = None) -> Net:
    """A plain net, no LoRA: the changes added to its weights, and (if given) this head in it."""
    net = Net()
    for name, delta in change.items():
        weight = net.get_parameter(f"{name}.weight")
        weight.data += torch.from_numpy(delta).reshape(weight.shape)
    for name, value in (head or {}).items():
        net.get_parameter(name).data.copy_(torch.from_numpy(value))
    return net


def through_peft(download: Download, folder: Path) -> Tensor:
    """The logits of a client that loads its download with PEFT, on a base into which the download's merged part went."""
    base = with_weights(changes(download.merged)) if download.merged else Net()
    model = PeftModel.from_pretrained(base, download.adapter.save(folder)).eval()
    with torch.no_grad():
        return model(IMAGES)


def held(layer: LoraLayer) -> Held:
    return Held(layer.A.numpy(), layer.B.numpy(), layer.scaling)


def mean_head(updates: list[ClientUpdate], only: str | None) -> dict[str, np.ndarray]:
    """Plain tensors: the mean over senders by examples, or the named client's own where nothing of them is shared."""
    mine = [u for u in updates if only in (u.client, None)]
    total = sum(u.num_examples for u in mine)
    return {
        name: sum(u.num_examples / total * u.adapter.tensors[name].numpy() for u in mine) for name in mine[0].adapter.tensors
    }


CASES = [
    Case(World(EQUAL, "standard")),
    Case(World(EQUAL, "rslora"), "two"),
    Case(World(MIXED, "standard")),
    Case(World(MIXED, "rslora"), "nobody of the top rank"),
    Case(World(MIXED, "constant"), "only the top"),
]


WHEN = [(method, replace(case, rounds=rounds)) for method in DEFINED for case in CASES for rounds in turns(method)]


@pytest.mark.parametrize(("method", "case"), WHEN, ids=[f"{label(method)}-{case}" for method, case in WHEN])
def test_a_client_applies_its_share_of_the_dense_definition(method, case, tmp_path):
    if len(set(case.world.ranks)) > 1 and not method.traits.mixed_ranks:
        case = Case(World(EQUAL, case.world.rule), rounds=case.rounds)
    before = after_rounds(method, case.world, case.rounds)
    updates = updates_of(method, before, case.drawn())
    after = method.aggregate(before, updates)
    options = dataclasses.asdict(method)
    already = changes(before.merged) if before.merged else {}  # what went into the base before: all trained on top of it
    shares = {}
    for name in (CONV, FC):
        given = {client.name: method.dispatch(before, client).slices[name] for client in case.drawn()}
        uploads = [Upload(u.client, held(u.adapter.layers[name]), u.num_examples, given[u.client]) for u in updates]
        shares[name] = DEFINITIONS[method.name](held(before.adapter.layers[name]), uploads, options)
    personal = "global" not in method.served(after)  # then the uploads say nothing of clients that were not there
    receivers = case.drawn() if personal else case.world.clients()
    for client in receivers:
        download = method.dispatch(after, client)
        share = {name: shares[name](client.name, download.slices[name]) + already.get(name, 0.0) for name in shares}
        expected = with_weights(share, mean_head(updates, client.name if personal else None))(IMAGES).detach()
        found = through_peft(download, tmp_path / client.name)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=lambda text, c=client: f"{c.name}: {text}")


def test_the_forward_pass_sees_every_part_of_a_change():
    """The instrument itself: a small change of any slice, of either layer or of the head shows in the logits."""
    plain = Net()(IMAGES)
    for name, (out, width) in {CONV: (9, 18), FC: (11, 9)}.items():
        for row, column in [(0, 0), (out - 1, width - 1), (2, width // 2)]:
            delta = np.zeros((out, width))
            delta[row, column] = 1e-3
            assert (with_weights({name: delta})(IMAGES) - plain).abs().max() > 1e-7
    bias = {"head.bias": np.full(4, 0.1)}
    assert (with_weights({}, bias)(IMAGES) - plain).abs().max() > 1e-3


def test_every_method_of_the_package_has_a_dense_definition():
    ours = {name for name, kind in REGISTRY.items() if kind.__module__.startswith("anyrank.methods")}
    assert ours <= DEFINITIONS.keys(), "write the method's definition into tests/conformance/dense.py"


def test_a_saved_share_says_its_rank_and_scaling(tmp_path):
    method = copy.copy(DEFINED[0])
    world = World(EQUAL, "standard")
    client = world.clients()[0]
    download = method.dispatch(after_one_round(method, world), client)
    again = Adapter.load(download.adapter.save(tmp_path))
    assert again.ranks == {CONV: 4, FC: 4}
    # alpha / r: 3 / 4 for the convolution (its own alpha), 4 / 4 for the linear layer.
    assert (again.layers[CONV].scaling, again.layers[FC].scaling) == (0.75, 1.0)

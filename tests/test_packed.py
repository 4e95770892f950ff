"""The frozen prefix and the packed layers: what they leave out changes nothing that is learned."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anyrank import simulation
from anyrank.config.sections import ClientsConfig, Config, LoraConfig, ModelConfig, TrainConfig
from anyrank.data import cache
from anyrank.errors import ConfigError
from anyrank.messages.plan import Plan
from anyrank.messages.records import Client, Scaling
from anyrank.studies import forecast
from anyrank.tasks.text import encoder, features
from anyrank.tasks.text import task as text
from anyrank.training import local
from anyrank.training.lora import LoraModel
from test_text_task import data, folders, load, settings, texts_of  # noqa: F401 - fixtures

pytest.importorskip("transformers")

TARGETS = ("layer.1.attention.self.query", "layer.1.attention.self.value", "layer.2.output.dense")
PLAN = Plan(TrainConfig(local_steps=5, batch_size=8), learning_rate=1e-2, round=1, seed=0)


@dataclass(frozen=True, eq=False)
class Recomputed:
    """Inputs without a cache: the frozen layers run anew for each batch, on the batch's own padding."""

    encoder: encoder.Encoder
    tokens: features.RaggedInputs
    stop: int
    packed: bool
    on_disk: bool = False
    nbytes: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, index, equal_lengths=False):
        ids = self.tokens.batch(index)
        with torch.no_grad():
            hidden = self.encoder.hidden(ids["inputs"], ids["mask"], None, self.stop)
        if self.packed:
            return {"inputs": hidden[ids["mask"]], "lengths": ids["mask"].sum(dim=1)}
        return {"inputs": hidden.masked_fill(~ids["mask"][:, :, None], 0.0), "mask": ids["mask"]}


def trained(task) -> tuple[dict, float]:
    """All factors after five local steps, and the last mean loss."""
    from anyrank.methods import make

    model, method = LoraModel(task), make("raflora", {})
    scaling = Scaling(2.0, "constant")
    state = method.init(model.start(4, scaling, 0), scaling, 0)
    update = local.train(model, "one", method.dispatch(state, Client("one", 4)), np.arange(len(task.train)), PLAN)
    model.close()
    return {(n, f): getattr(layer, f) for n, layer in update.adapter.layers.items() for f in "AB"}, update.metrics["loss"]


def without_cache(task, folder: Path, source, packed: bool = True):
    """The same task with its prefix recomputed at every step."""
    found = encoder.Encoder(encoder.find_source(settings(folder)), settings(folder))
    tokens = features.token_inputs(found.tokens(texts_of(source.source)), found.pad)
    return replace(task, train=replace(task.train, inputs=Recomputed(found, tokens, 1, packed)))


def farthest(one: dict, other: dict) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def test_a_cached_prefix_trains_the_adapters_that_the_whole_model_trains(folders, data, tmp_path):  # noqa: F811
    """To float32's rounding. Not to the bit: a product's last bits depend on how many rows share it, and the cache is filled
    in batches of its own."""
    task = load(folders["bert"], data, tmp_path / "cache", TARGETS)
    cached, loss = trained(task)
    recomputed, again = trained(without_cache(task, folders["bert"], data))
    assert loss == pytest.approx(again, rel=1e-5)
    assert farthest(cached, recomputed) < 1e-4, "of factors that move by 0.05 in these steps"


def test_a_cached_prefix_is_exact_to_the_bit_where_both_see_the_same_padding(folders, data, tmp_path):  # noqa: F811
    """The hidden states of each training batch, computed once in that batch and kept, train the very same adapters."""
    task = without_cache(load(folders["bert"], data, tmp_path / "cache", TARGETS), folders["bert"], data)
    kept: dict[tuple[int, ...], dict] = {}

    class Kept:
        def __len__(self):
            return len(task.train)

        def batch(self, index, equal_lengths=False):
            key = tuple(index.tolist())
            if key not in kept:
                kept[key] = task.train.inputs.batch(index)
            return {name: value.clone() if torch.is_tensor(value) else value for name, value in kept[key].items()}

    once = replace(task, train=replace(task.train, inputs=Kept()))
    first, _ = trained(once)
    second, _ = trained(once)  # from what is kept alone
    recomputed, _ = trained(task)
    assert farthest(first, recomputed) == farthest(second, recomputed) == 0


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_packed_layers_give_what_padded_ones_give(folders, data, tmp_path, architecture):  # noqa: F811
    task = load(folders[architecture], data, tmp_path / "cache", TARGETS)
    inputs = task.train.inputs
    assert inputs.packs
    padded = replace(task, train=replace(task.train, inputs=replace(inputs, packs=False)))
    assert "lengths" not in inputs.batch(torch.arange(4), equal_lengths=True)
    one, loss = trained(task)
    other, again = trained(padded)
    assert loss == pytest.approx(again, rel=1e-5)
    assert farthest(one, other) < 1e-4


CASES = {"all of a length": [5, 5, 5], "one text": [7], "one token": [1], "very unequal": [1, 30, 2, 17, 16]}


EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 100  # of what is left of long sums: some ten products of up to 48 terms stand before and after each gradient


class Cancelling:
    """The size of the terms that cancel in a gradient of a query's weight, while the module is run: at most
    `sum_i |g_i| |v| |k| |x| / sqrt(d)`, for g the gradient of what attention gives and the longest v, k and x.

    A softmax's gradient is `P (g v' - sum of P (g v'))`: of one token it is zero, and the difference of two equal numbers is
    as large as their rounding.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        own, self.held = layer.attention.self, {}
        self.width = own.attention_head_size
        for name in ("query", "key", "value"):
            getattr(own, name).register_forward_hook(functools.partial(self._keep, name))
        layer.attention.output.dense.register_forward_pre_hook(self._watch)

    def _keep(self, name: str, _, given: tuple[torch.Tensor], made: torch.Tensor) -> None:
        self.held[name] = given[0], made

    def _watch(self, _, given: tuple[torch.Tensor]) -> None:
        given[0].register_hook(lambda gradient: self.held.update(gradient=gradient))

    def size(self) -> float:
        lengths = [self.held["value"][1], self.held["key"][1], self.held["query"][0]]
        longest = torch.stack([values.detach().norm(dim=-1).max() for values in lengths])
        return float(self.held["gradient"].norm(dim=-1).sum() * longest.prod() / self.width**0.5)


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("architecture", "first"), [("bert", 0), ("bert", 1), ("roberta", 0), ("roberta", 2)])
def test_a_packed_batch_has_the_logits_and_gradients_of_a_padded_one(folders, architecture, first, lengths):  # noqa: F811
    """For the weights of every query, value and output of the layers, from token ids and from hidden states.

    A sum is known to a number of roundings of what comes out of it, and where it cancels to one rounding of each of the terms.
    """
    whole = encoder.Encoder(encoder.find_source(settings(folders[architecture])), settings(folders[architecture]))
    module = text.SplitClassifier(whole.model, whole.layers, first, torch.nn.Linear(32, 3))
    draw = torch.Generator().manual_seed(0)
    shape = (sum(lengths),) if first == 0 else (sum(lengths), 32)
    values = torch.randint(5, 20, shape, generator=draw) if first == 0 else torch.randn(shape, generator=draw)
    inputs = features.RaggedInputs(values, torch.tensor(lengths), whole.pad, packs=True)
    layers = [layer for layer in module.get_submodule(whole.layers)][first:]
    cancelling = [Cancelling(layer) for layer in layers]
    trained = [layer.attention.self.query.weight for layer in layers]
    trained += [part.weight for layer in layers for part in (layer.attention.self.value, layer.output.dense)]
    found = []
    for even in (False, True):
        for weight in trained:
            weight.requires_grad_(True)
        logits = module(**inputs.batch(torch.arange(len(lengths)), equal_lengths=even))
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(lengths)) % 3)
        found.append((logits, *torch.autograd.grad(loss, trained)))
    terms = [0.0, *(each.size() for each in cancelling), *[0.0] * 2 * len(layers)]
    for one, other, size in zip(*found, terms, strict=True):
        bound = ROUNDINGS * EPS * float(other.detach().abs().max()) + EPS * size
        torch.testing.assert_close(one, other, atol=bound, rtol=0)
        assert size == 0 or len(lengths) == 1 or bound < 1e-2 * float(other.abs().max()), "what it would let through is small"
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0][1:] if len(lengths) > 1)


def test_a_packed_batch_is_in_the_order_that_was_asked_for():
    """Texts 0 to 3 hold their own number as often as they are long."""
    held = features.RaggedInputs(torch.tensor([0, 1, 1, 1, 2, 2, 3]), torch.tensor([1, 3, 2, 1]), packs=True)
    batch = held.batch(torch.tensor([2, 0, 1]))
    assert batch["inputs"].tolist() == [2, 2, 0, 1, 1, 1]
    assert batch["lengths"].tolist() == [2, 1, 3]
    assert "mask" not in batch


def test_a_packed_pair_keeps_its_segments():
    segments = torch.tensor([0, 0, 1, 0, 1], dtype=torch.uint8)
    held = features.RaggedInputs(torch.tensor([4, 5, 6, 7, 8]), torch.tensor([3, 2]), packs=True, segments=segments)
    assert held.batch(torch.tensor([1, 0]))["segments"].tolist() == [0, 1, 0, 0, 1]


def test_layers_of_another_make_stay_padded(folders, data, tmp_path, monkeypatch):  # noqa: F811
    assert not load(folders["distilbert"], data, tmp_path / "a", ("layer.1.attention.q_lin",)).train.inputs.packs
    whole = load(folders["electra"], data, tmp_path / "b", ("layer.2.attention.self.query",))
    assert not whole.train.inputs.packs
    right = encoder.run_packed
    wrong = lambda layers, rows, lengths: right(layers, rows, lengths) + 1  # noqa: E731
    monkeypatch.setattr(encoder, "run_packed", wrong)
    assert not load(folders["bert"], data, tmp_path / "c", TARGETS).train.inputs.packs, "what differs is not used"


def test_packing_leaves_padding_out_of_the_products(folders, data, tmp_path):  # noqa: F811
    """The rows that a feed-forward layer sees are the tokens, not the padded batch."""
    task, rows = load(folders["bert"], data, tmp_path / "cache", TARGETS), []
    task.module.encoder.layer[2].output.dense.register_forward_hook(lambda m, given, out: rows.append(given[0].shape[:-1]))
    index = torch.arange(12)
    task.module(**task.train.inputs.batch(index))
    assert rows == [(int(task.train.inputs.lengths[index].sum()),)]


# --- on disk -----------------------------------------------------------------------------------------------------------


def test_features_on_disk_are_a_map_of_their_file(folders, data, tmp_path):  # noqa: F811
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("Linux tells what is mapped")
    in_memory = load(folders["bert"], data, tmp_path / "cache", TARGETS)
    assert str(tmp_path / "cache" / "features") not in maps.read_text()
    on_disk = load(folders["bert"], data, tmp_path / "cache", TARGETS, features="disk")
    assert str(tmp_path / "cache" / "features") in maps.read_text()
    first = load(folders["bert"], data, tmp_path / "new", TARGETS, features="disk")
    assert str(tmp_path / "new" / "features") in maps.read_text(), "also where they have just been computed"
    for task in (on_disk, first):
        assert torch.equal(task.train.inputs.values, in_memory.train.inputs.values)
    assert on_disk.train.inputs.nbytes == in_memory.train.inputs.nbytes
    one, other = trained(in_memory)[0], trained(on_disk)[0]
    assert farthest(one, other) == 0, "to the bit"


def test_a_mapped_file_that_is_damaged_is_as_if_it_were_not_there(tmp_path):
    path = cache.store(tmp_path, "features", {"a": "b"}, {"values": torch.ones(100)})
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert cache.load(tmp_path, "features", {"a": "b"}, mapped=True) is None


def test_the_size_and_the_place_are_told(folders, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    config = replace(
        Config().replace(run={"rounds": 1}),
        model=replace(settings(folders["bert"]), features="disk"),
        data=data,
        clients=ClientsConfig(count=2, participation=1.0, ranks=(2,)),
        lora=LoraConfig(target_modules=TARGETS),
    )
    summary = simulation.execute(config, tmp_path / "run")
    task = load(folders["bert"], data, tmp_path / "cache", TARGETS)
    assert summary["inputs_in"] == "disk"
    assert summary["inputs_bytes"] == task.train.inputs.nbytes + task.test.inputs.nbytes
    memory = forecast.cost(config, measure=False)["memory_bytes"]
    assert (memory["examples"], memory["examples_on_disk"]) == (0, summary["inputs_bytes"])
    with pytest.raises(ConfigError, match=r"model.features: expected one of memory, disk, got 'ram'"):
        ModelConfig(features="ram")

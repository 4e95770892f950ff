"""The frozen prefix and the packed layers: what they leave out changes nothing that is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anyrank import cache, local, plan, simulation
from anyrank.config import ClientsConfig, Config, LoraConfig, ModelConfig, TrainConfig
from anyrank.errors import ConfigError
from anyrank.models import LoraModel
from anyrank.records import Client, Scaling
from anyrank.tasks import encoder, features
from test_text_task import data, folders, load, settings, texts_of  # noqa: F401 - fixtures

pytest.importorskip("transformers")

TARGETS = ("layer.1.attention.self.query", "layer.1.attention.self.value", "layer.2.output.dense")
PLAN = local.Plan(TrainConfig(local_steps=5, batch_size=8), learning_rate=1e-2, round=1, seed=0)


@dataclass(frozen=True, eq=False)
class Recomputed:
    """Inputs without a cache: the frozen layers run anew for each batch, on the batch's own padding."""

    encoder: encoder.Encoder
    tokens: features.RaggedInputs
    stop: int
    packed: bool

    def batch(self, index, even=False):
        ids = self.tokens.batch(index)
        with torch.no_grad():
            hidden = self.encoder.hidden(ids["inputs"], ids["mask"], None, self.stop)
        hidden = hidden.masked_fill(~ids["mask"][:, :, None], 0.0)
        return {"inputs": hidden, "mask": ids["mask"]} | ({"packed": True} if self.packed else {})


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
        def batch(self, index, even=False):
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
    assert "packed" not in inputs.batch(torch.arange(4), even=True)
    one, loss = trained(task)
    other, again = trained(padded)
    assert loss == pytest.approx(again, rel=1e-5)
    assert farthest(one, other) < 1e-4


def test_layers_of_another_make_stay_padded(folders, data, tmp_path, monkeypatch):  # noqa: F811
    assert not load(folders["distilbert"], data, tmp_path / "a", ("layer.1.attention.q_lin",)).train.inputs.packs
    whole = load(folders["electra"], data, tmp_path / "b", ("layer.2.attention.self.query",))
    assert not whole.train.inputs.packs
    wrong = lambda layers, hidden, mask: encoder.run_layers(layers, hidden, mask) + 1  # noqa: E731
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
    memory = plan.plan(config, measure=False)["memory_bytes"]
    assert (memory["examples"], memory["examples_on_disk"]) == (0, summary["inputs_bytes"])
    with pytest.raises(ConfigError, match=r"model.features: expected one of memory, disk, got 'ram'"):
        ModelConfig(features="ram")

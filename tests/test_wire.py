"""Records as frames: every method trains over frames to the same bytes as without them, and what is counted is what is sent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import keys, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config, TrainConfig
from anyrank.engines.inprocess import InProcess
from anyrank.errors import FrameError
from anyrank.messages import frame as frames
from anyrank.messages import wire
from anyrank.messages.frame import Frame, Header
from anyrank.messages.plan import Plan
from anyrank.messages.records import (
    Client,
    ClientUpdate,
    Code,
    Download,
    Failure,
    Job,
    Pruning,
    Scaling,
    Scores,
    ServerState,
)
from anyrank.messages.scores import scores_frame, scores_of
from anyrank.methods import REGISTRY, Method, make
from anyrank.methods.ffa_lora import FFALoRA
from anyrank.runs.checkpoint import load_state
from anyrank.simulation.building import in_process
from anyrank.training import trainer

LIMIT = 1 << 24
PLAN = Plan(TrainConfig("sgd", momentum=0.5, local_epochs=2), learning_rate=1e-3, round=2, seed=7, step_factor=3)


def through(frame: Frame) -> Frame:
    """The frame that is received where this one is sent."""
    return frames.from_bytes(frames.to_bytes(frame), LIMIT)


# --- a federation over frames ----------------------------------------------------------------------------------------


@dataclass
class Sites:
    """An engine whose clients get their jobs as frames and send frames back. What a frame lacks, they have or derive."""

    inner: InProcess
    method: Method
    rank: int
    config: Config
    store: dict[str, Adapter] = field(default_factory=dict)
    bytes: list[tuple[int, int]] = field(default_factory=list)  # as counted, as sent

    @property
    def held(self) -> dict[str, str]:
        return self.inner.held

    def start(self, *arguments: Any) -> Adapter:
        return self.inner.start(*arguments)

    def evaluate(self, *arguments: Any) -> Scores:
        return scores_of(through(scores_frame(self.inner.evaluate(*arguments))))

    def close(self) -> None:
        self.inner.close()

    def train(self, jobs: Sequence[Job], plan: Plan, mechanism: Any = None, *more: Any) -> Iterator[ClientUpdate | Failure]:
        sent = {job.client.name: through(self.sent(job, plan)) for job in jobs}
        at_sites = [wire.job_of(sent[job.client.name], self.own(sent[job.client.name])) for job in jobs]
        plans = {json.dumps(dataclasses.asdict(wire.plan_of(each))) for each in sent.values()}
        assert plans == {json.dumps(dataclasses.asdict(plan))}
        downloads, theirs = ({job.client.name: job.download for job in each} for each in (jobs, at_sites))
        plan = wire.plan_of(through(wire.plan_frame(plan)))
        engine = self.inner
        for reply in trainer.train_cohort(engine.model, at_sites, engine.shards, plan, mechanism, engine.stacking, *more):
            assert isinstance(reply, ClientUpdate), str(reply)
            self.store[reply.client] = reply.adapter
            frame = through(wire.update_frame(reply, theirs[reply.client], "run", plan.round))
            self.bytes.append((theirs[reply.client].upload_bytes(reply.adapter), frame.array_bytes))
            wire.expect(frame, wire.UPDATE, run="run", round=plan.round, client=reply.client)
            yield wire.reply_of(frame, downloads[reply.client])

    def sent(self, job: Job, plan: Plan) -> Frame:
        frame = wire.download_frame(job.download, plan, job.client, job.num_examples, "run")
        self.bytes.append((job.download.download_bytes(), frame.array_bytes))
        return frame

    def own(self, frame: Frame) -> Adapter | None:
        """What `download_of` says: the client's own adapter of its last training, or what its method starts from."""
        if not wire.absent(frame):
            return None
        table = frame.header.body["client"]
        client, lora, seed = Client(**table), self.config.lora, self.config.run.seed
        scaling = Scaling(lora.alpha, lora.scaling)
        state = self.method.init(self.inner.start(self.rank, scaling, seed), scaling, seed)
        start = self.method.dispatch(dataclasses.replace(state, round=frame.header.round - 1), client)
        return self.store.get(client.name, start.adapter) if start.private else start.adapter


def config(method: str, options: dict[str, Any], **sections: dict[str, Any]) -> Config:
    ranks = (1, 2, 8) if REGISTRY[method].traits.mixed_ranks else (4,)
    base = Config().replace(
        run={"rounds": 4},
        model={"name": "digits-mlp", "head": "trained"},
        clients={"count": 5, "participation": 0.6, "ranks": ranks},
        train={"local_steps": 3},
        method={"name": method, "options": options},
    )
    return base.replace(**sections)


def left(folder: Path) -> dict[str, bytes]:
    """All adapters of a run."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/adapter_*"))}
    assert "adapter/adapter_model.safetensors" in found
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


METHODS = sorted(name for name, kind in REGISTRY.items() if kind.__module__.startswith("anyrank.methods"))
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {name: (name, {}, {}) for name in METHODS}
PRIVATE = {"level": "example", "noise_multiplier": 1.0, "delta": 1e-4}
RUNS |= {
    "stayput, every option": ("stayput", {"true_point": True, "rotate": True, "momentum": 0.5, "server_rank": 12}, {}),
    "stayput, balanced": ("stayput", {"split": "balanced"}, {}),
    "ffa_lora, gaussian": ("ffa_lora", {"init_a": "gaussian"}, {}),
    "ffa_lora, orthonormal": ("ffa_lora", {"init_a": "orthonormal"}, {}),
    "hetlora that prunes": (
        "hetlora",
        {"penalty": 1.0},
        {
            "train": {"optimizer": "sgd", "learning_rate": 0.02, "local_steps": 5},
            "clients": {"ranks": (8,), "participation": 1.0},
        },
    ),
    "proximal term, one by one": ("rbla", {}, {"run": {"rounds": 3, "stacking": "never"}, "train": {"proximal_mu": 0.1}}),
    "preconditioned": ("rolora", {}, {"train": {"precondition": True, "local_steps": 5}}),
    "private examples": ("raflora", {}, {"privacy": PRIVATE}),
    "private clients": ("ffa_lora", {}, {"privacy": PRIVATE | {"level": "client"}}),
}


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    monkeypatch.setenv("ANYRANK_PRIVACY_SEED", "these tests have a secret that everybody knows")


@pytest.mark.parametrize("name", RUNS)
def test_over_frames_every_method_leaves_the_same_bytes(name: str, tmp_path: Path) -> None:
    method, options, sections = RUNS[name]
    chosen, made = config(method, options, **sections), []

    def over_frames(setting: Any) -> Sites:
        made.append(Sites(in_process(setting), make(method, options), setting.largest_rank, chosen))
        return made[0]

    simulation.execute(chosen, tmp_path / "without")
    simulation.execute(chosen, tmp_path / "over", engine=over_frames)
    sites, private = made[0], make(method, options).private
    assert left(tmp_path / "over") == left(tmp_path / "without")
    counted = [{k: v for k, v in row.items() if not private or "bytes" in k} for row in rows(tmp_path / "without")]
    assert [{k: row[k] for k in counted[0]} for row in rows(tmp_path / "over")] == counted
    assert len(sites.bytes) >= 2 * 3 * len(counted) or REGISTRY[method].pools_data
    for as_counted, as_sent in sites.bytes:
        assert as_counted == as_sent
    if private:  # the server of a simulation keeps these for its clients; over frames they never reach a server
        kept = load_state(tmp_path / "without" / "checkpoint" / "state.safetensors").extra
        known = load_state(tmp_path / "over" / "checkpoint" / "state.safetensors").extra
        assert kept.keys() == sites.store.keys()
        for client, adapter in kept.items():
            assert same_adapters(adapter, sites.store[client], private)
            assert not same_adapters(adapter, known[client], private)


def test_the_runs_over_frames_are_what_they_are_taken_for(tmp_path: Path) -> None:
    """A hetlora client has lower ranks than it was registered with, and stayput's clients train slices past their own rank."""
    seen: list[Frame] = []

    class Watched(Sites):
        def sent(self, job: Job, plan: Plan) -> Frame:
            seen.append(super().sent(job, plan))
            return seen[-1]

    for name in ("hetlora that prunes", "stayput, every option", "flora"):
        method, options, sections = RUNS[name]
        chosen = config(method, options, **sections)
        build = lambda s, m=method, o=options, c=chosen: Watched(in_process(s), make(m, o), s.largest_rank, c)  # noqa: E731
        simulation.execute(chosen, tmp_path / name, engine=build)
    kinds = {frame.header.body["rescale"] for frame in seen}
    assert kinds == {"B", "both"}
    assert any(layer[0] < frame.header.body["client"]["rank"]
               for frame in seen for layer in frame.header.body["adapter"]["layers"].values())  # fmt: skip
    assert any(isinstance(slices, list) and max(slices) >= len(slices)
               for frame in seen for slices in frame.header.body["slices"].values())  # fmt: skip
    assert any(frame.header.body["merged"] for frame in seen)
    assert any("tensor/fc.weight" in frame.arrays or any(n.startswith("tensor/") for n in frame.arrays) for frame in seen)


# --- what is absent --------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def same_layers(one: LoraLayer, other: LoraLayer, factors: str = "AB") -> bool:
    plain = (one.scaling, one.kind, one.kernel) == (other.scaling, other.kind, other.kernel)
    return plain and all(same(getattr(one, factor), getattr(other, factor)) for factor in factors)


def same_adapters(one: Adapter, other: Adapter, parts: frozenset[str] = frozenset({"A", "B", "tensors"})) -> bool:
    factors = "".join(sorted(parts - {"tensors"}))
    layers = list(one.layers) == list(other.layers)
    layers = layers and all(same_layers(one.layers[name], other.layers[name], factors) for name in one.layers)
    if "tensors" not in parts:
        return layers
    return layers and list(one.tensors) == list(other.tensors) and all(map(same, one.tensors.values(), other.tensors.values()))


def world(dtype: torch.dtype = torch.float32) -> Adapter:
    """A linear, a convolution and an embedding of rank 3, and plain tensors: a head, a counter, an empty one, a mask."""
    draw = keys.generator(0, "wire")
    numbers = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)  # noqa: E731
    layers = {
        "z.fc": LoraLayer(numbers(3, 5), numbers(4, 3), 0.1),
        "a.conv": LoraLayer(numbers(3, 18), numbers(7, 3), 2.0, "conv2d", (3, 3)),
        "m.embed": LoraLayer(numbers(3, 11), numbers(6, 3), 1 / 3, "embedding"),
    }
    tensors = {
        "head.weight": numbers(2, 4),
        "norm.num_batches_tracked": torch.tensor(2**62 - 1),
        "none": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "half": torch.tensor([1.0], dtype=torch.bfloat16),
    }
    return Adapter(layers, tensors, {"base_model_name_or_path": "base", "target_modules": ["z.fc"], "task_type": None})


def full(adapter: Adapter, **fields: Any) -> Download:
    slices = {name: (0, 1, 2) for name in adapter.layers}
    return Download(adapter, **({"slices": slices | {"a.conv": (4, 1, 9)}} | fields))


def sent(download: Download, **keywords: Any) -> Frame:
    return through(wire.download_frame(download, PLAN, Client("ada", 3, {"z.fc": 3}), 17, "run-1", **keywords))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", ["A", "B", "AB"])
def test_a_download_arrives_as_it_was_sent(dtype: torch.dtype, train: str) -> None:
    adapter = world(dtype)
    merged = Adapter({"m.embed": adapter.layers["m.embed"]}, {}, {"other": 1.5})
    download = full(adapter, train=frozenset(train), merged=merged, pruning=Pruning(0.5, 0.1, 1), rescale="both")
    frame = sent(download)
    got = wire.download_of(frame)
    assert wire.absent(frame) == frozenset()
    assert same_adapters(got.adapter, adapter)
    assert got.adapter.config == adapter.config
    assert same_adapters(got.merged, merged)
    assert got.merged.config == {"other": 1.5}
    assert dataclasses.replace(got, adapter=adapter, merged=merged) == download
    assert frame.array_bytes == download.download_bytes()
    job = wire.job_of(frame)
    assert (job.client, job.num_examples) == (Client("ada", 3, {"z.fc": 3}), 17)
    assert wire.plan_of(frame) == PLAN
    assert (frame.header.run, frame.header.round, frame.header.client) == ("run-1", 2, "ada")


@given(
    send=st.frozensets(st.sampled_from("AB")),
    private=st.frozensets(st.sampled_from(["A", "B", "tensors"])),
    train=st.frozensets(st.sampled_from("AB"), min_size=1),
)
def test_a_frame_holds_what_is_sent_and_not_private_and_nothing_else(
    send: frozenset[str], private: frozenset[str], train: frozenset[str]
) -> None:
    adapter, own = world(), world()
    download = full(adapter, send=send, private=private, train=train)
    frame = sent(download)
    expected = {factor + "/" + name for factor in send - private for name in adapter.layers}
    expected |= {f"tensor/{name}" for name in adapter.tensors} if "tensors" not in private else set()
    assert frame.arrays.keys() == expected
    assert frame.array_bytes == download.download_bytes()
    assert same_adapters(wire.download_of(frame, own).adapter, adapter)
    if wire.absent(frame):
        with pytest.raises(FrameError, match="own adapter, got none"):
            wire.download_of(frame)
    moved = Adapter({n: layer.with_factors(layer.A + 1, layer.B + 1) for n, layer in adapter.layers.items()}, adapter.tensors)
    upload = through(wire.update_frame(ClientUpdate(moved, 17, "ada", {"loss": 0.5, "steps": 3}), download))
    assert {name for name in upload.arrays if name[0] in "AB"} == {f"{f}/{n}" for f in train - private for n in adapter.layers}
    assert upload.array_bytes == download.upload_bytes()
    update = wire.update_of(upload, download)
    for name, layer in update.adapter.layers.items():
        for factor in "AB":
            source = moved if factor in train - private else adapter
            assert same(getattr(layer, factor), getattr(source.layers[name], factor))
    assert (update.client, update.num_examples, update.metrics) == ("ada", 17, {"loss": 0.5, "steps": 3})


def test_private_parts_are_the_sites_own_and_are_not_compared_with_the_servers() -> None:
    adapter = world()
    own = Adapter({n: layer.with_factors(layer.A, 2 * layer.B) for n, layer in adapter.layers.items()},
                  adapter.tensors | {"head.weight": torch.ones(2, 4)})  # fmt: skip
    got = wire.download_of(sent(full(adapter, private=frozenset({"B", "tensors"}))), own)
    assert same_adapters(got.adapter, own)


def test_a_seeded_factor_that_differs_in_one_bit_is_refused() -> None:
    adapter = world()
    frame = sent(full(adapter, send=frozenset("B"), train=frozenset("B")))
    A = adapter.layers["a.conv"].A.clone()
    A.view(torch.int32)[2, 17] ^= 1
    own = Adapter(adapter.layers | {"a.conv": adapter.layers["a.conv"].with_factors(A, adapter.layers["a.conv"].B)})
    with pytest.raises(FrameError, match="download, A: expected the digest .*seed everywhere"):
        wire.download_of(frame, own)
    short = adapter.layers["a.conv"]
    own = Adapter(adapter.layers | {"a.conv": short.with_factors(short.A[:2], short.B[:, :2])})
    with pytest.raises(FrameError, match=r"layer a.conv, A: expected the site's own torch.float32 of shape \[3, 18\], got"):
        wire.download_of(frame, own)


def test_ffa_loras_a_is_nowhere_in_its_frame() -> None:
    """Not even in the header: no eight bytes of A are among the frame's."""
    scaling = Scaling(16)
    state: ServerState = FFALoRA().init(world(), scaling, seed=5)
    download = FFALoRA().dispatch(state, Client("ada", 2))
    data = frames.to_bytes(wire.download_frame(download, PLAN, Client("ada", 2), 17))
    for layer in download.adapter.layers.values():
        raw = bits(layer.A)
        assert not any(raw[i : i + 8] in data for i in range(0, len(raw) - 8, 4))


# --- updates ---------------------------------------------------------------------------------------------------------


def test_a_pruned_layer_comes_back_at_the_rank_that_pruning_leaves_and_at_no_other() -> None:
    adapter = world()
    download = full(adapter, pruning=Pruning(0.7, 0.0, 1))  # floor(0.7 * 3) = 2
    cut = lambda layer, rank: layer.with_factors(layer.A[:rank], layer.B[:, :rank])  # noqa: E731
    pruned = dataclasses.replace(adapter, layers=adapter.layers | {"z.fc": cut(adapter.layers["z.fc"], 2)})
    frame = through(wire.update_frame(ClientUpdate(pruned, 17, "ada"), download))
    assert same_adapters(wire.update_of(frame, download).adapter, pruned)
    assert frame.array_bytes == download.upload_bytes(pruned) < download.upload_bytes()
    shorter = dataclasses.replace(adapter, layers=adapter.layers | {"z.fc": cut(adapter.layers["z.fc"], 1)})
    frame = through(wire.update_frame(ClientUpdate(shorter, 17, "ada"), download))
    with pytest.raises(FrameError, match=r"update, A/z.fc: expected float32 of shape \[2, 5\] or \[3, 5\], got .*\[1, 5\]"):
        wire.update_of(frame, download)
    mixed = Frame(frame.header, frame.arrays | {"A/z.fc": np.zeros((3, 5), np.float32), "B/z.fc": np.zeros((4, 2), np.float32)})
    with pytest.raises(FrameError, match=r"update, B/z.fc: expected float32 of shape \[4, 3\], got"):
        wire.update_of(mixed, download)
    if_not = full(adapter)
    frame = through(wire.update_frame(ClientUpdate(pruned, 17, "ada"), download))
    with pytest.raises(FrameError, match=r"expected float32 of shape \[3, 5\], got float32 of shape \[2, 5\]"):
        wire.update_of(frame, if_not)


def altered(frame: Frame, arrays: dict[str, Any] | None = None, without: str = "", **body: Any) -> Frame:
    kept = {name: array for name, array in frame.arrays.items() if name != without}
    header = dataclasses.replace(frame.header, body={**frame.header.body, **body})
    return Frame(header, kept | (arrays or {}), frame.bfloat16 - {without} - (arrays or {}).keys())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"without": "A/z.fc"}, "update, A/z.fc: expected an array of that name, got none"),
        ({"arrays": {"A/other": np.zeros(3)}}, "update, A/other: expected no array of that name, got float64"),
        ({"arrays": {"A/z.fc": np.zeros((3, 5))}}, r"expected float32 of shape \[3, 5\], got float64"),
        ({"arrays": {"A/z.fc": np.zeros((1, 5), np.float32)}}, r"got float32 of shape \[1, 5\]"),
        ({"arrays": {"tensor/mask": np.zeros(2, np.uint8)}}, "tensor/mask: expected bool"),
        ({"num_examples": 0}, "num_examples must be a whole number of at least 1, got 0"),
        ({"num_examples": True}, "num_examples: expected int, got bool"),
        ({"num_examples": 1.0}, "num_examples: expected int, got float"),
        ({"metrics": {"loss": "low"}}, "metric loss: expected float or int, got str"),
        ({"metrics": []}, "metrics: expected dict, got list"),
        ({"more": 1}, "update: expected the keys num_examples, metrics, got num_examples, metrics, more"),
    ],
)
def test_an_update_of_another_form_is_refused_in_a_line(change: dict[str, Any], reason: str) -> None:
    download = full(world())
    frame = wire.update_frame(ClientUpdate(download.adapter, 17, "ada"), download)
    wire.update_of(through(frame), download)
    with pytest.raises(FrameError, match=reason) as refusal:
        wire.update_of(through(altered(frame, **change)), download)
    assert "\n" not in str(refusal.value)


def test_an_update_of_other_names_is_refused_where_it_is_sent() -> None:
    download = full(world())
    fewer = Adapter({"z.fc": download.adapter.layers["z.fc"]}, download.adapter.tensors)
    with pytest.raises(FrameError, match="a.conv is in the download and not in the update"):
        wire.update_frame(ClientUpdate(fewer, 17, "ada"), download)
    more = dataclasses.replace(download.adapter, tensors=download.adapter.tensors | {"zz": torch.ones(1)})
    with pytest.raises(FrameError, match="zz is in the update and not in the download"):
        wire.update_frame(ClientUpdate(more, 17, "ada"), download)


def test_a_frame_of_another_kind_run_round_or_client_is_refused() -> None:
    frame = through(wire.failure_frame(Failure("ada", Code.LATE), "run-1", 3))
    wire.expect(frame, wire.FAILURE, run="run-1", round=3, client="ada")
    for wrong, reason in (
        ({"run": "run-2"}, "failure: expected run run-2, got run-1"),
        ({"round": 4}, "failure: expected round 4, got 3"),
        ({"client": "eve"}, "failure: expected client eve, got ada"),
    ):
        with pytest.raises(FrameError, match=reason):
            wire.expect(frame, wire.FAILURE, **wrong)
    with pytest.raises(FrameError, match="expected one of kind update, got failure"):
        wire.update_of(frame, full(world()))
    for read in (wire.download_of, wire.plan_of, wire.absent, scores_of, wire.job_of):
        with pytest.raises(FrameError, match="got failure"):
            read(frame)


def test_a_reason_leaves_its_site_only_where_that_is_allowed() -> None:
    failure = Failure("ada", Code.CRASHED, "row 3 of patients.csv has no label")
    download = full(world())
    assert wire.reply_of(through(wire.failure_frame(failure)), download) == Failure("ada", Code.CRASHED)
    assert b"patients" not in frames.to_bytes(wire.failure_frame(failure))
    assert wire.reply_of(through(wire.failure_frame(failure, with_reason=True)), download) == failure
    odd = Frame(Header("failure", client="ada", body={"code": "TIRED", "reason": ""}), {})
    with pytest.raises(FrameError, match="failure, code: expected one of DIVERGED, .*, got TIRED"):
        wire.failure_of(odd)


# --- downloads of a wrong form ---------------------------------------------------------------------------------------


def plan_table(**changes: Any) -> dict[str, Any]:
    return dataclasses.asdict(PLAN) | changes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"plan": plan_table(round=3)}, "plan, round: expected 2, the frame's, got 3"),
        ({"plan": plan_table(learning_rate=-1.0)}, "learning_rate: expected a number of at least 0, got -1.0"),
        ({"plan": plan_table(step_factor=0)}, "step_factor: expected a whole number of at least 1, got 0"),
        ({"plan": plan_table(seed="7")}, "plan, seed: expected int, got str"),
        ({"plan": plan_table(config={})}, "plan, config: expected the keys optimizer"),
        ({"plan": plan_table(config=dataclasses.asdict(TrainConfig()) | {"batch_size": 0})}, "plan, config: train.batch_size"),
        (
            {"plan": plan_table(config=dataclasses.asdict(TrainConfig()) | {"momentum": "x"})},
            "momentum: expected int or float, got str",
        ),
        ({"num_examples": 0}, "num_examples: expected a whole number of at least 1, got 0"),
        ({"client": {"name": "eve", "rank": 3, "layer_ranks": {}}}, "client: expected ada, the frame's, got eve"),
        ({"client": {"name": "ada", "rank": 0, "layer_ranks": {}}}, "rank: expected a whole number of at least 1"),
        ({"client": {"name": "ada", "rank": 3, "layer_ranks": {"z.fc": "3"}}}, "z.fc: expected a whole number of at least 1"),
        ({"train": ["A", "C"]}, r"train: expected different ones of A, B, got \['A', 'C'\]"),
        ({"train": ["A", "A"]}, "train: expected different ones of A, B"),
        ({"private": [["A"]]}, "private: expected different ones of A, B, tensors"),
        ({"rescale": "A"}, "rescale: expected B or both, got A"),
        ({"reduced": "int4"}, "reduced: expected bfloat16, int8 or nothing, got 'int4'"),
        ({"slices": {}}, "slices: expected one entry per layer"),
        ({"slices": {"z.fc": 2, "a.conv": 3, "m.embed": 3}}, "slices of z.fc: expected 3 different slices, got 2"),
        ({"slices": {"z.fc": [0, 1, 1], "a.conv": 3, "m.embed": 3}}, "expected 3 different slices"),
        ({"slices": {"z.fc": [0, 1, -1], "a.conv": 3, "m.embed": 3}}, "expected a whole number of at least 0, got -1"),
        ({"slices": {"z.fc": [0, 1, [2]], "a.conv": 3, "m.embed": 3}}, "expected a whole number of at least 0"),
        ({"pruning": {"gamma": 0.5}}, "pruning: expected the keys gamma, penalty, min_rank, got gamma"),
        ({"merged": []}, "merged: expected dict or NoneType, got list"),
        ({"absent": "0" * 64}, "download, factors: expected the digest 0000000000000000, got none"),
        ({"without": "A/z.fc"}, "download, A/z.fc: expected an array of that name"),
        ({"arrays": {"x": np.zeros(1)}}, "download, x: expected no array of that name"),
    ],
)
def test_a_download_of_another_form_is_refused_in_a_line(change: dict[str, Any], reason: str) -> None:
    frame = wire.download_frame(full(world()), PLAN, Client("ada", 3), 17)
    read = lambda frame: (wire.job_of(frame), wire.plan_of(frame))  # noqa: E731
    read(through(frame))
    with pytest.raises(FrameError, match=reason) as refusal:
        read(through(altered(frame, **change)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([3, 4, 5, "float32", 0.1, "linear"], r"expected \[rank, out, in, dtype, scaling, kind, kernel\]"),
        ([2, 4, 5, "float32", 0.1, "linear", [1, 1]], r"expected float32 of shape \[2, 5\]"),
        ([0, 4, 5, "float32", 0.1, "linear", [1, 1]], "expected a whole number of at least 1, got 0"),
        ([3, 4, 5, "int8", 0.1, "linear", [1, 1]], "expected floating numbers, got int8"),
        ([3, 4, 5, ["x"], 0.1, "linear", [1, 1]], "expected one of bool"),
        ([3, 4, 5, "float32", 0, "linear", [1, 1]], "scaling: expected a positive number, got 0"),
        ([3, 4, 5, "float32", "1", "linear", [1, 1]], "scaling: expected float or int, got str"),
        ([3, 4, 5, "float32", 0.1, "conv3d", [1, 1]], "kind: expected one of linear, conv2d, embedding"),
        ([3, 4, 5, "float32", 0.1, "linear", [1]], "expected a kind and a kernel"),
        ([3, 4, 5, "float32", 0.1, "linear", [1, -1]], "expected a whole number of at least 1, got -1"),
        ([3, 4, 5, "float32", 0.1, "linear", "no"], "expected a kind and a kernel"),
        ({}, "got {}"),
    ],
)
def test_a_layer_of_another_form_is_refused_in_a_line(entry: Any, reason: str) -> None:
    frame = wire.download_frame(full(world()), PLAN, Client("ada", 3), 17)
    table = frame.header.body["adapter"]
    changed = altered(frame, adapter=table | {"layers": table["layers"] | {"z.fc": entry}})
    with pytest.raises(FrameError, match=reason):
        wire.download_of(through(changed))


def test_tensors_that_a_frame_cannot_hold_are_refused() -> None:
    adapter = world()
    for odd in (torch.ones(2, dtype=torch.complex64), torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        holds = dataclasses.replace(adapter, tensors={"odd": odd})
        with pytest.raises(FrameError, match="expected numbers of bool"):
            wire.download_frame(full(holds), PLAN, Client("ada", 3), 17)
    merged = Adapter({"z.fc": adapter.layers["z.fc"]}, {"head": torch.ones(1)})
    with pytest.raises(FrameError, match="merged: expected no plain tensors, got head"):
        wire.download_frame(full(adapter, merged=merged), PLAN, Client("ada", 3), 17)
    with pytest.raises(FrameError, match="finite numbers"):
        wire.update_frame(ClientUpdate(adapter, 17, "ada", {"loss": float("nan")}), full(adapter))


def test_tensors_that_are_not_contiguous_arrive_as_they_were() -> None:
    layer = LoraLayer(torch.arange(30.0).view(10, 3).T[:, ::2], torch.arange(12.0).view(3, 4).T, 1.0)
    adapter = Adapter({"x": layer}, {"same": torch.ones(1).expand(2, 3)})
    download = Download(adapter, {"x": (0, 1, 2)})
    frame = sent(download)
    assert same_adapters(wire.download_of(frame).adapter, adapter)
    assert frame.array_bytes == download.download_bytes() == 4 * (3 * 5 + 4 * 3 + 6)


def test_a_download_without_layers_arrives_as_it_was() -> None:
    """A head alone, an empty sum, and a client's ranks in a mapping that cannot be copied."""
    download = Download(Adapter({}, {"head": torch.ones(2)}), {}, merged=Adapter({}))
    client = Client("ada", 3, MappingProxyType({"q": 2}))
    job = wire.job_of(through(wire.download_frame(download, PLAN, client, 17)))
    assert same_adapters(job.download.adapter, download.adapter)
    assert job.download.merged.layers == {}
    assert job.client == Client("ada", 3, {"q": 2})


def test_a_frame_from_an_engine_that_hands_over_arrays_may_hold_them_in_any_layout() -> None:
    """Engines with a transport of their own take header and arrays apart; what they give back need not lie in order."""
    download = full(world(), train=frozenset("B"))
    sent = wire.download_frame(download, PLAN, Client("ada", 3), 17)
    for layout in (
        lambda a: np.array(a, order="F"),
        lambda a: a[::-1].copy()[::-1] if a.ndim else a,
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    ):
        arrays = {name: layout(array) for name, array in sent.arrays.items()}
        frame = Frame(Header(**json.loads(json.dumps(dataclasses.asdict(sent.header)))), arrays, sent.bfloat16)
        assert same_adapters(wire.download_of(frame).adapter, download.adapter)


def test_what_is_received_is_the_receivers_own() -> None:
    download = full(world())
    frame = wire.download_frame(download, PLAN, Client("ada", 3), 17)
    got = wire.download_of(through(frame))
    got.adapter.layers["z.fc"].A.add_(1)
    got.adapter.tensors["head.weight"].add_(1)
    assert same_adapters(download.adapter, world())


# --- fewer bits ------------------------------------------------------------------------------------------------------

VALUES = {torch.float64: 64, torch.float32: 32, torch.float16: 16}


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    rank=st.integers(1, 4),
    out=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_int8_errs_by_at_most_half_a_step_of_its_slice(data: Any, dtype: torch.dtype, rank: int, out: int, width: int) -> None:
    """Step: the slice's largest number over 127. A half float is at most half a unit in its last place off on top."""
    draw = lambda *shape: torch.tensor(data.draw(st.lists(  # noqa: E731
        st.floats(allow_nan=False, allow_infinity=False, width=VALUES[dtype]), min_size=shape[0] * shape[1],
        max_size=shape[0] * shape[1])), dtype=torch.float64).to(dtype).view(*shape)  # fmt: skip
    layer = LoraLayer(draw(rank, width), draw(out, rank), 1.0)
    download = full(world(), merged=Adapter({"x": layer}))
    frame = sent(download, reduced="int8")
    got = wire.download_of(frame).merged.layers["x"]
    assert got.A.dtype == dtype
    for x, y in ((layer.A.double(), got.A.double()), (layer.B.T.double(), got.B.T.double())):
        step = x.abs().amax(dim=1, keepdim=True) / 127
        unit = torch.finfo(dtype).eps * x.abs().amax(dim=1, keepdim=True) + 2 * torch.finfo(dtype).smallest_normal * (
            torch.finfo(dtype).eps
        )
        assert torch.isfinite(y).all()
        assert ((x - y).abs() <= step / 2 + unit).all()
    assert frame.array_bytes == download.download_bytes("int8")
    assert same_adapters(wire.download_of(frame).adapter, download.adapter), "what is trained is exact"


def test_int8_holds_the_smallest_numbers_that_there_are() -> None:
    """In units of 2^-1074: 190 / 127 is 1.496, and the smallest step whose 127 reach 190 is 2; 190 = 95 * 2, 127 = 127 * 1."""
    unit = 2.0**-1074
    layer = LoraLayer(torch.tensor([[190.0, -96.0], [127.0, 1.0]], dtype=torch.float64) * unit, torch.zeros(1, 2).double(), 1.0)
    got = wire.download_of(sent(full(world(), merged=Adapter({"x": layer})), reduced="int8")).merged.layers["x"]
    assert same(got.A, layer.A)


@given(st.lists(st.floats(min_value=-3e38, max_value=3e38), min_size=6, max_size=6))
def test_bfloat16_errs_by_at_most_four_thousandths(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64).view(2, 3)
    for dtype in (torch.float64, torch.float32):
        layer = LoraLayer(x.to(dtype), x.T[:1].to(dtype).T.contiguous().T.expand(1, 2).contiguous(), 1.0)
        download = full(world(), merged=Adapter({"x": layer}))
        frame = sent(download, reduced="bfloat16")
        got = wire.download_of(frame).merged.layers["x"]
        assert got.A.dtype == dtype
        assert ((layer.A.double() - got.A.double()).abs() <= 0.004 * layer.A.double().abs() + 2.0**-133).all()
        assert frame.array_bytes == download.download_bytes("bfloat16")


def test_fewer_bits_are_fewer_bytes_by_the_count() -> None:
    """A `[3, 5]` and B `[4, 3]`: 27 numbers; int8 has two steps of 8 bytes for each of 3 slices."""
    for dtype, width in ((torch.float64, 8), (torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)):
        adapter = world(dtype)
        download = full(adapter, merged=Adapter({"z.fc": adapter.layers["z.fc"]}))
        bare = full(adapter).download_bytes()
        counted = [download.download_bytes(reduced) - bare for reduced in ("", "bfloat16", "int8")]
        assert counted == [27 * width, 27 * min(width, 2), 27 + 2 * 3 * 8]
        if width == 2:  # two bytes stay as they are
            assert same_adapters(wire.download_of(sent(download, reduced="bfloat16")).merged, download.merged)


def test_numbers_that_fewer_bits_cannot_hold_are_refused() -> None:
    adapter = world(torch.float64)
    layer = adapter.layers["z.fc"]
    for reduced, value in (("bfloat16", 3.4e38), ("bfloat16", float("nan")), ("int8", float("inf")), ("int8", float("nan"))):
        odd = layer.with_factors(torch.full_like(layer.A, value), layer.B)
        with pytest.raises(FrameError, match="send it exactly"):
            sent(full(adapter, merged=Adapter({"z.fc": odd})), reduced=reduced)
    with pytest.raises(FrameError, match="reduced: expected bfloat16, int8 or nothing, got 'int4'"):
        sent(full(adapter), reduced="int4")


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_arrive_as_they_were() -> None:
    scores = Scores(
        correct=np.array([True, False]),
        losses=np.array([0.1, np.inf]),
        labels=np.array([3, 4]),
        scores=np.array([[0.5, 0.5], [1, 0]], np.float32),
        names=("a", "b"),
        figures={"f1": 1 / 3, "auc": float("nan"), "recall": {"a": 1.0, "b": 0.25}},
        sites={"north": {"f1": 0.1, "auc": None, "recall": {"a": 0.5}}, "south": {}},
    )
    got = scores_of(through(scores_frame(scores)))
    for key in ("correct", "losses", "labels", "scores"):
        np.testing.assert_array_equal(getattr(got, key), getattr(scores, key))
        assert getattr(got, key).dtype == getattr(scores, key).dtype
    assert (got.predictions, got.targets, got.names) == (None, None, ("a", "b"))
    assert got.figures["f1"] == 1 / 3
    assert np.isnan(got.figures["auc"])
    assert got.figures["recall"] == {"a": 1.0, "b": 0.25}
    assert got.sites == scores.sites


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"without": "losses"}, "expected losses"),
        ({"arrays": {"losses": np.zeros(2, np.float32)}}, "expected losses"),
        ({"arrays": {"labels": np.zeros(3)}}, r"labels: expected 2 examples, got shape \[3\]"),
        ({"arrays": {"correct": np.zeros(2)}}, "correct: expected bool, got float64"),
        ({"arrays": {"more": np.zeros(2)}}, "scores, more: expected no array"),
        ({"figures": {"f1": 1}}, "figure f1: expected a place among 1 numbers, got 1"),
        ({"figures": {"f1": -1}}, "figure f1: expected a place among 1 numbers, got -1"),
        ({"figures": {"f1": {"a": {"b": 0}}}}, "figure f1: expected a place among 1 numbers"),
        ({"figures": {"f1": True}}, "figure f1: expected a place"),
        ({"names": [1]}, "names: expected str, got int"),
        ({"sites": {"north": 1}}, "site north: expected dict, got int"),
        ({"sites": {"north": {"f1": 7}}}, "figure f1: expected a place among 1 numbers, got 7"),
        ({"sites": [1]}, "scores.*sites"),
    ],
)
def test_scores_of_another_form_are_refused_in_a_line(change: dict[str, Any], reason: str) -> None:
    scores = Scores(np.array([True, False]), np.zeros(2), np.zeros(2, int), figures={"f1": 0.5})
    frame = scores_frame(scores)
    scores_of(through(frame))
    with pytest.raises(FrameError, match=reason):
        scores_of(through(altered(frame, **change)))

"""Replies in a file: the same results as in memory, bit for bit, for every method and rule; and what files and peers may do."""

from __future__ import annotations

import errno
import gc
import io
import os
import stat
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyrank import files, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config, TrainConfig
from anyrank.engines.inbox import Inbox
from anyrank.errors import FrameError, RunFailed
from anyrank.federation import guard
from anyrank.federation.intake import collect
from anyrank.messages import frame as frames
from anyrank.messages import spool as spools
from anyrank.messages import spooled, wire
from anyrank.messages.plan import Plan
from anyrank.messages.records import BOTH, Client, ClientUpdate, Code, Download, Failure, Job, ServerState
from anyrank.messages.spool import Spool
from anyrank.methods import Method
from anyrank.robust.base import Rule
from anyrank.robust.central_noise import CentralNoise
from anyrank.robust.coordinates import Median, TrimmedMean
from anyrank.robust.geometric_median import GeometricMedian
from anyrank.robust.krum import Krum
from anyrank.robust.norm_bound import NormBound
from anyrank.robust.owners import SingleOwner
from anyrank.runs.checkpoint import load_state, save_state
from conformance.world import EQUAL, MIXED, SEED, VARIANTS, World, begin, contents, count, everything, label, train

LIMIT = 1 << 24
PLAN = Plan(TrainConfig(), learning_rate=1e-3, round=1, seed=SEED, step_factor=1)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array of every reply goes to the file."""
    monkeypatch.setattr(spools, "SMALL", 0)
    monkeypatch.setattr(spools, "LEAST", 0)


def whole(download: Download) -> Download:
    return replace(download, send=BOTH, private=frozenset())


def data_of(update: ClientUpdate, download: Download) -> bytes:
    return frames.to_bytes(wire.update_frame(update, download, "run", 1))


def received(data: bytes, spool: Spool, limit: int = LIMIT) -> frames.Frame | spools.Spooled:
    return spools.receive(io.BytesIO(data), limit, lambda: spool)


# --- the same results ------------------------------------------------------------------------------------------------


def world_of(method: Method) -> World:
    return World(MIXED if method.traits.mixed_ranks else EQUAL, dtype=torch.float32)


def in_memory(method: Method, rule: Rule, bound: Rule, state: ServerState, clients: Sequence[Client]) -> ServerState:
    jobs = [Job(client, count(client), lambda client=client: method.dispatch(state, client)) for client in clients]
    updates = [guard.admit(train(job.download, job.client, 1), job.download, job.client.name, job.num_examples) for job in jobs]
    return settled(method, rule, bound, state, jobs, updates)


def over_files(
    method: Method, rule: Rule, bound: Rule, state: ServerState, clients: Sequence[Client], folder: Path
) -> ServerState:
    """The same round, whose downloads are read from a file when they are sent, and whose uploads lie in one."""
    state = replace(state, adapter=spooled.shelved(state.adapter, Spool(folder)))
    jobs = [Job(client, count(client), lambda client=client: method.dispatch(state, client)) for client in clients]
    spool, updates = Spool(folder), []
    for job in jobs:
        sent = whole(job.download)
        data = frames.to_bytes(wire.download_frame(sent, PLAN, job.client, job.num_examples))
        there = wire.job_of(frames.from_bytes(data, LIMIT))
        reply = received(data_of(train(there.download, there.client, 1), there.download), spool)
        assert isinstance(reply, spools.Spooled)
        update = guard.admit(spooled.reply_of(reply, sent), job.download, job.client.name, job.num_examples)
        assert spooled.is_kept(update.adapter)
        updates.append(update)
        job.settle()
    after = settled(method, rule, bound, state, jobs, updates)
    if not method.private:
        assert spooled.is_kept(after.adapter)
    return after


def settled(
    method: Method, rule: Rule, bound: Rule, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]
) -> ServerState:
    passed = bound.screen(state, jobs, updates).updates
    return rule.aggregate(method, state, rule.screen(state, jobs, passed).updates)


RULES = {
    "none": lambda method: Rule(),
    "krum": lambda method: Krum(0, keep=1),
    "multi-krum": lambda method: Krum(0, keep=3),
    "geometric median": lambda method: GeometricMedian() if method.by_examples else None,
    "trimmed mean": lambda method: TrimmedMean(0.3) if method.weights else None,
    "median": lambda method: Median() if method.weights else None,
    "owners": lambda method: SingleOwner(0.2, method.lone_weight),
    "noise": lambda method: noise(method),
}


class Draws:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def standard_normal(self, size: int) -> np.ndarray:
        return self.rng.standard_normal(size)


def noise(method: Method) -> Rule | None:
    if not method.weights:
        return None
    plan = SimpleNamespace(clip_norm=0.1, noise={"any": 1.5})
    return CentralNoise(SimpleNamespace(plan=plan, draws=lambda round, where: Draws()))  # type: ignore[arg-type]


def applies(method: Method, rule: str) -> bool:
    return rule == "none" or not (method.private or method.pools_data)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_every_method_under_every_rule_gives_the_same_state_from_files(method: Method, rule: str, tmp_path: Path) -> None:
    """Two rounds: the second one starts from a state that lies in a file itself."""
    made = RULES[rule](method) if applies(method, rule) else None
    if made is None:
        pytest.skip(f"{rule} is refused for {method.name}")
    world = world_of(method)
    bound = NormBound(0.8) if applies(method, "krum") else Rule()
    plain = kept = begin(method, world)
    for _ in range(2):
        plain = in_memory(method, made, bound, plain, world.clients())
        kept = over_files(method, made, bound, kept, world.clients(), tmp_path)
        assert everything(kept) == everything(plain)
    for client in world.clients():
        one, other = method.dispatch(plain, client), method.dispatch(kept, client)
        assert contents(one.adapter) == contents(other.adapter)
        assert contents(one.merged) == contents(other.merged)
        assert (one.slices, one.download_bytes()) == (other.slices, other.download_bytes())
        for reduced in ("", "int8", "bfloat16"):
            sent = [frames.to_bytes(wire.download_frame(each, PLAN, client, 1, "", reduced)) for each in (one, other)]
            assert sent[0] == sent[1]
    assert not list(tmp_path.iterdir())


def test_a_step_is_shortened_in_these_cases_at_all(tmp_path: Path) -> None:
    method = next(method for method in VARIANTS if method.name == "rbla")
    state, clients = begin(method, world_of(method)), world_of(method).clients()
    jobs = [Job(client, count(client), lambda client=client: method.dispatch(state, client)) for client in clients]
    found = NormBound(0.8).screen(state, jobs, [train(job.download, job.client, 1) for job in jobs])
    assert found.shortened


@pytest.mark.parametrize("bound", [1e-3, 1.0, 10.0, 1e6])
def test_the_bound_on_a_change_is_the_same(bound: float, tmp_path: Path) -> None:
    method = next(method for method in VARIANTS if method.name == "rbla")
    state, client = begin(method, world_of(method)), world_of(method).clients()[-1]
    sent, spool = method.dispatch(state, client), Spool(tmp_path)
    update = train(sent, client, 1)
    reply = spooled.reply_of(received(data_of(update, sent), spool), sent)
    verdicts = []
    for each in (update, reply):
        try:
            verdicts.append(contents(guard.admit(each, sent, client.name, count(client), bound).adapter))
        except guard.Rejected as reason:
            verdicts.append(str(reason))
    assert verdicts[0] == verdicts[1]
    assert isinstance(verdicts[0], str) == (bound <= 1)  # by 0.5 in each of more than 100 numbers: between 1 and 1e6 in all


@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_a_checkpoint_and_an_adapter_of_a_state_in_a_file_have_the_same_bytes(method: Method, tmp_path: Path) -> None:
    world = world_of(method)
    plain = in_memory(method, Rule(), Rule(), begin(method, world), world.clients())
    spool = Spool(tmp_path)
    kept = replace(
        plain,
        adapter=spooled.shelved(plain.adapter, spool),
        merged=plain.merged and spooled.shelved(plain.merged, spool),
        extra={name: spooled.shelved(each, spool) for name, each in plain.extra.items()},
    )
    for name, state in (("plain", plain), ("kept", kept)):
        save_state(state, tmp_path / name)
        state.adapter.save(tmp_path / f"adapter-{name}")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "kept").read_bytes()
    assert everything(load_state(tmp_path / "kept")) == everything(plain)
    for path in sorted((tmp_path / "adapter-plain").iterdir()):
        assert path.read_bytes() == (tmp_path / "adapter-kept" / path.name).read_bytes()
    assert contents(Adapter.load(tmp_path / "adapter-kept")) == contents(Adapter.load(tmp_path / "adapter-plain"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_of_every_type_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.tensor([[0.0, -0.0, 1.5, -2.25, 6e-5, 1000.0]]).to(dtype)
    layer = LoraLayer(numbers, numbers.reshape(6, 1), 2.0, "conv2d", (1, 3))
    tensors = {"steps": torch.arange(5), "mask": torch.tensor([True, False]), "empty": torch.zeros(0, 3)}
    kept = spooled.shelved(Adapter({"layer": layer}, tensors, {"r": 1}), Spool(tmp_path))
    assert contents(kept) == contents(Adapter({"layer": layer}, tensors))
    assert (kept.config, kept.ranks) == ({"r": 1}, {"layer": 1})


# --- what comes over the stream --------------------------------------------------------------------------------------


def start(rank: int = 3) -> Download:
    draw = torch.Generator().manual_seed(rank)
    layers = {name: LoraLayer(torch.randn(rank, 7, generator=draw), torch.randn(5, rank, generator=draw), 1.0) for name in "ab"}
    return Download(Adapter(layers, {"head": torch.randn(4, generator=draw)}), dict.fromkeys("ab", tuple(range(rank))))


def reply(name: str = "client-0") -> ClientUpdate:
    return ClientUpdate(start(3).adapter, 2, name, {"loss": 1.0})


class Slow(io.RawIOBase):
    """A stream that gives at most so many bytes at a time."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data, self.most = memoryview(data), most

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), self.most, len(self.data))
        buffer[:count], self.data = self.data[:count], self.data[count:]
        return count


DATA = frames.to_bytes(wire.update_frame(reply(), start(), "run", 1))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(most=st.integers(1, 400), small=st.sampled_from([0, 1 << 20]), least=st.sampled_from([0, 30, 1 << 12]))
def test_a_frame_is_the_same_in_a_file_and_in_memory(most: int, small: int, least: int, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spools, "SMALL", small)
        patch.setattr(spools, "LEAST", least)
        found = spools.receive(Slow(DATA, most), LIMIT, lambda: Spool(tmp_path))
        assert isinstance(found, spools.Spooled) == (not small and least < 84)  # the largest array: 3 x 7 numbers of 4 bytes
        update = spooled.reply_of(found, start())
    assert (contents(update.adapter), update.metrics, update.client) == (contents(reply().adapter), {"loss": 1.0}, "client-0")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_frame_is_refused_in_one_line_wherever_the_damage_is(at: int, bit: int, cut: bool, tmp_path: Path) -> None:
    data = bytearray(DATA)
    data[at] ^= 1 << bit
    with pytest.raises(FrameError) as caught:
        received(bytes(data[:at] if cut else data), Spool(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_frame_above_its_limit_is_refused_before_a_byte_of_it_is_kept(tmp_path: Path) -> None:
    def never() -> Spool:
        raise AssertionError("a file was made")

    with pytest.raises(FrameError, match="at most"):
        spools.receive(io.BytesIO(DATA), len(DATA) - 1, never)
    assert isinstance(received(DATA, Spool(tmp_path), len(DATA)), spools.Spooled)


def test_a_frame_that_announces_more_than_comes_takes_no_more_disk_than_came(tmp_path: Path) -> None:
    big = frames.to_bytes(frames.Frame(frames.Header("update"), {"A/a": np.zeros(1 << 24, np.uint8)}))
    spool = Spool(tmp_path)
    with pytest.raises(FrameError, match="cut short"):
        received(big[: 1 << 19], spool, 1 << 25)
    assert os.fstat(spool._file.fileno()).st_size <= 1 << 19


def test_no_bool_is_2_in_a_file_either(tmp_path: Path) -> None:
    data = bytearray(frames.to_bytes(frames.Frame(frames.Header("update"), {"tensor/m": np.zeros(9, bool)})))
    data[-33] = 2  # the last byte before the digest
    with pytest.raises(FrameError, match="0 and 1"):
        received(bytes(data), Spool(tmp_path))


@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_the_limit_of_a_reply_follows_from_its_download(method: Method) -> None:
    """An honest reply with as many and as long metrics as the guard takes fits in; 2 MB more do not."""
    world = world_of(method)
    for client in world.clients():
        sent = method.dispatch(begin(method, world), client)
        metrics = {f"{i:03d}" + "m" * 500: 1 / 3 for i in range(100)}
        data = data_of(replace(train(sent, client, 1), metrics=metrics), sent)
        assert len(data) <= spooled.reply_limit(sent) <= len(data) + (2 << 20)


def test_an_inbox_takes_no_more_than_the_replies_that_it_expects(tmp_path: Path) -> None:
    large = frames.to_bytes(frames.Frame(frames.Header("update", client="client-0"), {"A/a": np.zeros(3 << 20, np.uint8)}))
    inbox = Inbox(tmp_path)
    with inbox.open():
        inbox.expect(start())
        assert isinstance(inbox(io.BytesIO(DATA), 1 << 40), spools.Spooled)
        with pytest.raises(FrameError, match="at most"):
            inbox(io.BytesIO(large), 1 << 40)
    assert isinstance(inbox(io.BytesIO(large), 1 << 40), frames.Frame)  # no reply of a client: its caller's own limit holds
    with inbox.open():
        inbox.expect(start(), in_memory=True)
        assert isinstance(inbox(io.BytesIO(DATA), 1 << 40), frames.Frame)


def test_a_second_reply_of_a_client_is_a_stray_and_the_first_one_counts(tmp_path: Path) -> None:
    spool, job = Spool(tmp_path), Job(Client("client-0", 3), 2, start)
    other = replace(reply(), adapter=replace(start().adapter, tensors={"head": torch.zeros(4)}))
    both = [spooled.reply_of(received(data_of(each, start()), spool), start()) for each in (reply(), other)]
    collected = collect(both, [job], [], 1)
    assert [(row["client"], row["status"]) for row in collected.rows] == [("client-0", "ok"), ("client-0", "stray")]
    assert contents(collected.updates[0].adapter) == contents(reply().adapter)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_rejected_from_a_file(number: float, tmp_path: Path) -> None:
    bad = start().adapter
    bad.layers["b"].B[4, 2] = number
    found = spooled.reply_of(received(data_of(replace(reply(), adapter=bad), start()), Spool(tmp_path)), start())
    with pytest.raises(guard.Rejected, match="layer b, B"):
        guard.admit(found, start(), "client-0", 2)


# --- what the disk does ----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_bit_that_changes_on_disk_after_the_check_is_an_error_and_no_number(at: int, bit: int, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    update = spooled.reply_of(received(DATA, spool), start())
    size = os.fstat(spool._file.fileno()).st_size
    spool._file.seek(at % size)
    byte = spool._file.read(1)[0]
    spool._file.seek(at % size)
    spool._file.write(bytes([byte ^ 1 << bit]))
    with pytest.raises(RunFailed) as caught:
        contents(update.adapter)
    assert "changed after it was checked" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    update = spooled.reply_of(received(DATA, spool), start())
    os.ftruncate(spool._file.fileno(), 10)
    with pytest.raises(RunFailed, match="changed after it was checked"):
        contents(update.adapter)


def full_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [writes]

    def reached(what: str, path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "reached", reached)


@pytest.mark.parametrize("writes", range(6))
def test_a_full_disk_costs_the_reply_that_came_and_no_other(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file itself is one write, each of the five arrays another: before the last of them, the reply cannot be kept."""
    stream = io.BytesIO(DATA + data_of(reply("client-1"), start()))
    full_after(writes, monkeypatch)
    failed = spools.receive(stream, LIMIT, lambda: Spool(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(spools, "SMALL", 0)
    monkeypatch.setattr(spools, "LEAST", 0)
    found = spooled.reply_of(failed, start())
    told = "its reply could not be kept on the server's disk (No space left on device); free space there"
    assert found == Failure("client-0", Code.CRASHED, told)
    following = spools.receive(stream, LIMIT, lambda: Spool(tmp_path))  # the stream stands behind the first frame
    assert contents(spooled.reply_of(following, start()).adapter) == contents(reply().adapter)


def test_a_disk_that_is_full_for_what_a_client_did_not_send_costs_its_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = replace(start(), train=frozenset("B"))
    frame = received(data_of(reply(), sent), Spool(tmp_path))
    full_after(1, monkeypatch)
    found = spooled.reply_of(frame, sent)
    assert isinstance(found, Failure)
    assert "No space left on device" in found.reason


def test_a_disk_that_is_full_at_the_merge_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = next(method for method in VARIANTS if method.name == "rbla")
    state, client = begin(method, world_of(method)), world_of(method).clients()[-1]
    sent = method.dispatch(state, client)
    update = spooled.reply_of(received(data_of(train(sent, client, 1), sent), Spool(tmp_path)), sent)
    full_after(0, monkeypatch)
    with pytest.raises(RunFailed) as caught:
        method.aggregate(state, [update])
    assert "No space left on device" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the file itself -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nameless", "named first"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "named first":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


@pytest.mark.skipif(os.name != "posix", reason="a name can be taken from an open file")
def test_the_file_has_no_name_and_is_for_its_user_alone(kind: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    found = os.fstat(spool._file.fileno())
    assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0o600, 0)
    assert not list(tmp_path.iterdir())
    assert not os.get_inheritable(spool._file.fileno())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux lists the open files")
def test_the_file_is_closed_with_the_last_update_that_lies_in_it(kind: str, tmp_path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    update = spooled.reply_of(received(DATA, Spool(tmp_path)), start())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    layers = update.adapter.layers
    del update
    gc.collect()
    assert layers["a"].rank == 3  # still there
    del layers
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_in_its_place_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    target = tmp_path / "precious"
    target.write_bytes(b"kept")
    (tmp_path / f".replies-known.{os.getpid()}.tmp").symlink_to(target)
    failed = spools.receive(io.BytesIO(DATA), LIMIT, lambda: Spool(tmp_path))
    assert wire.failure_of(failed).code is Code.CRASHED
    assert target.read_bytes() == b"kept"


def test_a_name_that_a_kill_left_is_one_that_the_next_run_sweeps_away(tmp_path: Path) -> None:
    """Where there are no nameless files, a kill between two steps leaves a name; 2^22 + 1 is no process on Linux."""
    left = tmp_path / ".replies-0123456789abcdef.4194305.tmp"
    left.write_bytes(b"1")
    assert files.is_temporary(left)
    files.sweep(tmp_path)
    assert not left.exists()


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["raflora", "fedsa"])
def test_a_run_whose_replies_lie_in_files_leaves_the_same_bytes(
    method: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fedsa's clients keep parts of their own, which the server holds for them in memory."""
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    made: list[Path] = []
    begun = Spool.__init__
    monkeypatch.setattr(Spool, "__init__", lambda self, folder: (made.append(folder), begun(self, folder))[1])
    base = Config().replace(
        run={"rounds": 2},
        model={"name": "digits-mlp", "head": "trained"},
        clients={"count": 4, "ranks": (1, 2, 8)},
        train={"local_steps": 2},
        method={"name": method},
    )
    for engine in ("process", "workers"):
        simulation.execute(base.replace(run={"engine": engine, "workers": 1}), tmp_path / engine)
    found = [
        {str(path.relative_to(tmp_path / engine)): path.read_bytes() for path in sorted((tmp_path / engine).glob("adapter*/*"))}
        for engine in ("process", "workers")
    ]
    assert found[0] == found[1]
    assert "adapter/adapter_model.safetensors" in found[0]
    assert set(made) == {tmp_path / "workers"}
    assert not [path for path in (tmp_path / "workers").iterdir() if "replies" in path.name]


MEMORY = """
import io, sys, torch
from pathlib import Path
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages import frame, spool, spooled, wire
from anyrank.messages.records import Client, ClientUpdate, Download, Scaling, ServerState
from anyrank import methods

torch.set_num_threads(1)
def status(name):
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith(name))

layers = {f"{i:02d}": LoraLayer(torch.randn(64, 1024), torch.randn(1024, 64), 1.0) for i in range(32)}
sent = Download(Adapter(layers), {name: tuple(range(64)) for name in layers})
own, method = spool.Spool(Path(sys.argv[1])), methods.make(sys.argv[2], {})
state = ServerState(0, 0, spooled.shelved(sent.adapter, own.fresh()), Scaling(1.0, "constant"))
class Frame(io.RawIOBase):
    def __init__(self, pieces):
        self.pieces, self.left = pieces, memoryview(b"")
    def readinto(self, buffer):
        self.left = self.left or next(self.pieces)
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count
def update(i):
    stream = Frame(frame.pieces(wire.update_frame(ClientUpdate(sent.adapter, 1, f"c{i:02d}"), sent)))
    return spooled.reply_of(spool.receive(stream, 1 << 30, lambda: own), sent)
method.aggregate(state, [update(0)])
before = status("VmRSS")
updates = [update(i) for i in range(20)]
after = method.aggregate(state, updates)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux reports the peak of memory")
@pytest.mark.parametrize("method", ["rbla", "flexlora"])
def test_memory_holds_one_layer_of_all_clients(method: str, tmp_path: Path) -> None:
    """20 adapters of 17 MB are 336 MB. One layer of all is 10 MB, and an SVD needs a few times as much."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path), method]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout)
    assert grown < 110


def test_a_spool_is_let_go_with_its_layers_and_not_when_somebody_collects(tmp_path: Path) -> None:
    """The disk would fill with the rounds that are over: a circle of references waits for Python's collector."""
    held = spooled.layers_in(Spool(tmp_path))
    held["q"] = LoraLayer(torch.ones(2, 600_000), torch.ones(3, 2), 1.0)
    assert torch.equal(held["q"].A, torch.ones(2, 600_000))
    spool = weakref.ref(held.spool)
    gc.disable()
    try:
        del held
        assert spool() is None
    finally:
        gc.enable()

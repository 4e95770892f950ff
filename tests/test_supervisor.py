"""A supervised process may do whatever it likes: who asks it gets a reply or one error, in time, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank.messages.frame import Frame, Header
from anyrank.worker import memory, supervisor
from anyrank.worker.supervisor import Died, Late, Supervised

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is left is looked up in /proc")

LIMIT = 1 << 20  # bytes of a reply
TIME_S = 0.7  # for a reply of a process that has opened
LONGEST_S = 60.0  # in which a test must have its answer, however busy the machine
HONEST = """
import itertools, os, signal, sys, time
from anyrank.messages.frame import Frame, Header, read, to_bytes, write
taken = lambda: read(sys.stdin.buffer, 1 << 30)
whole = lambda kind, about="": to_bytes(Frame(Header(kind[:9], client=about, body={"rest": kind[9:]}), {}))
def say(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
def serve():
    taken()
    say(whole("ready"))
    while True:
        say(whole("echo", taken().header.client))
"""
# What a process does after it has opened as it should, by name; what its error says; whether it is late.
FAULTS: dict[str, tuple[str, str, type[Exception]]] = {
    "ends": ("taken(); sys.exit(3)", "its process ended with status 3", Died),
    "is killed": ("taken(); os.kill(os.getpid(), 9)", "was ended by signal 9, from outside or because memory was short", Died),
    "breaks": ("taken(); os.kill(os.getpid(), 11)", "was ended by signal 11", Died),
    "says why": ("taken(); sys.exit('the disk is full')", "ended with status 1; its last words: the disk is full", Died),
    "writes what is no frame": ("taken(); say(b'Loading model ... done in 3 s'); time.sleep(999)", "this is not a frame", Died),
    "boasts": ("taken(); say(whole('x' * 2**21)); time.sleep(999)", "expected at most 1048576 bytes, got a frame of", Died),
    "damages a frame": ("taken(); d = bytearray(whole('echo')); d[-1] ^= 1; say(d); time.sleep(999)", "it was damaged", Died),
    "is cut short": ("taken(); say(whole('echo')[:-3]); sys.exit(0)", "its process ended with status 0", Died),
    "is cut short and stays": ("taken(); say(whole('echo')[:-3]); time.sleep(999)", "it took too long", Late),
    "closes its pipes and stays": ("taken(); os.close(1); os.close(0); time.sleep(999)", "cut short", Died),
    "never reads": ("time.sleep(999)", "it took too long", Late),
    "hangs": ("taken(); time.sleep(999)", "it took too long", Late),
    "hangs in C": ("taken(); any(itertools.repeat(0))", "it took too long", Late),
    "is stopped": ("taken(); os.kill(os.getpid(), signal.SIGSTOP)", "it took too long", Late),
    "ignores SIGTERM": ("signal.signal(signal.SIGTERM, signal.SIG_IGN); taken(); time.sleep(999)", "it took too long", Late),
    "only reports": ("taken()\nwhile True: say(whole('progress')); time.sleep(0.01)", "it took too long", Late),
    "leaves a child that holds its pipes": ("taken()\nif os.fork(): sys.exit(5)\ntime.sleep(999)", "ended with status 5", Died),
    "is refused memory": ("taken(); raise MemoryError('8 GB')", "memory ran out; its last words: MemoryError: 8 GB", Died),
    "lacks memory": (f"taken(); sys.exit({memory.STATUS})", "memory ran out", Died),
}  # fmt: skip


def program(*parts: str) -> tuple[str, ...]:
    return (sys.executable, "-c", "\n".join((HONEST, *parts)))


def faulty(folder: Path, *faults: str) -> tuple[str, ...]:
    """A process that opens and then has the first of `faults`; the next process has the next one; later ones are honest."""
    lines = ["taken(); say(whole('ready'))", f"done = len(os.listdir({str(folder)!r}))"]
    for place, fault in enumerate(faults):
        body = FAULTS[fault][0].replace("\n", "\n    ")
        lines += [f"if done == {place}:", f"    open({str(folder)!r} + f'/{{done}}', 'w').close()", f"    {body}"]
    lines += ["while True: say(whole('echo', taken().header.client))"]
    return program(*lines)


def question(name: str = "north", size: int = 1 << 18) -> Frame:
    """More than a pipe holds."""
    return Frame(Header("question", client=name), {"A": np.zeros(size, np.float32)})


def supervised(command: tuple[str, ...], **ways) -> Supervised:
    opened = ways.pop("opened", lambda frame: None)
    return Supervised(lambda: Frame(Header("setup"), {}), opened, LIMIT, command=command, **ways)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children(of: int | None = None) -> list[int]:
    """The processes whose parent is this one, dead ones that nobody waited for too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            found += [int(entry.name)] if int(parent) == (of or os.getpid()) else []
    return found


def marked(mark: str) -> list[int]:
    """The processes that are alive and have `mark` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"ANYRANK_MARK={mark}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(ready: Callable[[], bool], seconds: float = LONGEST_S) -> None:
    last = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < last, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No descriptor, no thread, no child: neither alive nor dead."""
    monkeypatch.setattr(supervisor, "_PAUSES_S", (0.0,))
    supervisor._STARTER.run(lambda: None)  # its thread stays, for all workers
    before = descriptors(), threading.active_count(), children()
    yield
    wait_until(lambda: (descriptors(), threading.active_count(), children()) == before, seconds=10)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_error_and_the_next_question_is_answered(tmp_path: Path, fault: str) -> None:
    worker = supervised(faulty(tmp_path, fault), env={"ANYRANK_MARK": str(tmp_path)})
    _, says, kind = FAULTS[fault]
    with pytest.raises(kind, match=says) as raised:
        list(worker.ask([question()], 1, TIME_S))
    assert worker.pid is None
    assert "\n" not in str(raised.value)
    assert getattr(raised.value, "out_of_memory", False) == ("memory" in fault)
    wait_until(lambda: not marked(str(tmp_path)))
    assert [reply.header.client for reply in worker.ask([question("south")], 1, LONGEST_S)] == ["south"]
    worker.close()


@settings(max_examples=6)
@given(st.lists(st.sampled_from([name for name in FAULTS if FAULTS[name][2] is Died]), min_size=2, max_size=4))
def test_after_any_faults_nothing_is_left(tmp_path_factory: pytest.TempPathFactory, faults: list[str]) -> None:
    folder, before = tmp_path_factory.mktemp("faults"), (descriptors(), threading.active_count(), children())
    worker = supervised(faulty(folder, *faults))
    for fault in faults:
        with pytest.raises(Died, match=FAULTS[fault][1]):
            list(worker.ask([question()], 1, LONGEST_S))
        assert (descriptors(), children()) == (before[0], before[2])
    assert len(list(worker.ask([question()], 1, LONGEST_S))) == 1
    worker.close()
    wait_until(lambda: (descriptors(), threading.active_count(), children()) == before, seconds=10)


def test_what_was_not_asked_for_is_no_reply_to_the_next_question(tmp_path: Path) -> None:
    """The first process replies twice. Its second reply would be taken for the one to the next question."""
    worker = supervised(faulty_reply(tmp_path, "say(whole('echo', 'north') * 2); time.sleep(999)"))
    assert [reply.header.client for reply in worker.ask([question("north")], 1, LONGEST_S)] == ["north"]
    first = worker.pid
    time.sleep(0.1)  # until the second reply is in the pipe
    assert [reply.header.client for reply in worker.ask([question("south")], 1, LONGEST_S)] == ["south"]
    assert worker.pid != first
    worker.close()


def faulty_reply(folder: Path, body: str) -> tuple[str, ...]:
    """A process of which the first one does `body` in place of its first reply."""
    mark = f"mark = {str(folder / 'mark')!r}"
    once = f"if not os.path.exists(mark):\n    open(mark, 'w').close(); taken(); say(whole('ready')); taken(); {body}"
    return program(mark, once, "serve()")


@pytest.mark.parametrize("end", ["sys.exit(0)", "os.kill(os.getpid(), 9)"])
def test_an_end_between_two_questions_costs_nothing(tmp_path: Path, end: str) -> None:
    worker = supervised(faulty_reply(tmp_path, f"say(whole('echo', 'north')); {end}"))
    assert len(list(worker.ask([question("north")], 1, LONGEST_S))) == 1
    wait_until(lambda: worker.pid is None)
    assert [reply.header.client for reply in worker.ask([question("south")], 1, LONGEST_S)] == ["south"]
    worker.close()


def test_the_limit_is_of_each_reply_and_not_of_all() -> None:
    slow = "for _ in range(4): time.sleep(0.7); say(whole('echo', 'north'))\ntime.sleep(999)"
    worker = supervised(program("taken(); say(whole('ready')); taken()", slow))
    assert len(list(worker.ask([question()], 4, 2.5))) == 4  # in 2.8 s
    worker.close()


@pytest.mark.parametrize("how", ["time.sleep(999)", "any(itertools.repeat(0))", "taken(); time.sleep(999)"])
def test_a_hang_while_it_loads_has_a_limit_too(how: str) -> None:
    worker = supervised(program(how), load_s=TIME_S)
    with pytest.raises(Late):
        list(worker.ask([question()], 1))
    assert worker.pid is None


def test_a_flood_of_words_is_taken_in_and_its_end_is_kept() -> None:
    """20 MB in one line, in time, and not in memory: a process whose stderr nobody reads would wait for ever."""
    flood = "taken()\nfor _ in range(320): os.write(2, b'x' * 65536)\nsys.exit('the end')"
    worker = supervised(program("taken(); say(whole('ready'))", flood))
    with pytest.raises(Died, match="the end") as raised:
        list(worker.ask([question()], 1, LONGEST_S))
    assert len(str(raised.value)) < 400
    assert len(worker._words._tail) <= 1 << 13


def test_a_child_in_a_session_of_its_own_holds_nobody_up(tmp_path: Path) -> None:
    """It escapes the kill and keeps the pipes open: there is no end of them, but the worker is dead."""
    escapes = f"taken()\nif os.fork(): sys.exit(5)\nos.setsid(); open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid()))"
    worker = supervised(program("taken(); say(whole('ready'))", escapes, "time.sleep(999)"))
    with pytest.raises(Died, match="status 5"):
        list(worker.ask([question()], 1, LONGEST_S))
    wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().isdigit())
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_pauses_grow_while_it_keeps_dying_and_a_reply_ends_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_PAUSES_S", (0.0, 0.2, 0.5))
    worker, waited = supervised(faulty(tmp_path, "ends", "ends", "ends")), []
    monkeypatch.setattr(worker._stopped, "wait", lambda seconds: waited.append(seconds))
    for _ in range(3):
        with pytest.raises(Died):
            list(worker.ask([question()], 1, LONGEST_S))
    list(worker.ask([question()], 1, LONGEST_S))
    assert waited == [0.0, 0.2, 0.5, 0.5]
    worker.end()
    list(worker.ask([question()], 1, LONGEST_S))
    assert waited[-1] == 0.0
    worker.close()


@pytest.mark.parametrize("moment", ["before it starts", "in its pause", "while it loads", "while it is asked"])
def test_a_kill_from_another_thread_comes_at_once(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_PAUSES_S", (0.0, 999.0))
    hangs = "taken(); time.sleep(999)" if moment == "while it loads" else "taken(); say(whole('ready')); time.sleep(999)"
    worker = supervised(program(hangs))
    worker._deaths = int(moment == "in its pause")
    if moment == "before it starts":
        worker.kill()
    else:
        threading.Timer(0.7, worker.kill).start()
    with pytest.raises(Died, match="it was stopped"):
        list(worker.ask([question()], 1))
    with pytest.raises(Died, match="it was stopped"):
        worker.start()


def test_after_a_kill_it_may_be_revived() -> None:
    worker = supervised(program("serve()"))
    worker.kill()
    worker.revive()
    assert len(list(worker.ask([question()], 1, LONGEST_S))) == 1
    worker.close()


@pytest.mark.parametrize("way", ["it ends with its pipe", "it ignores that", "it has never started", "twice"])
def test_close_ends_it(way: str) -> None:
    stays = "signal.signal(signal.SIGTERM, signal.SIG_IGN); taken(); say(whole('ready')); time.sleep(999)"
    worker = supervised(program(stays if way == "it ignores that" else "serve()"))
    if way != "it has never started":
        worker.start()
    for _ in range(2 if way == "twice" else 1):
        worker.close()
    assert worker.pid is None
    with pytest.raises(Died, match="it was stopped"):
        worker.start()


def test_no_process_can_be_started() -> None:
    worker = supervised(("/nowhere/python",))
    with pytest.raises(Died, match="no process can be started \\(No such file"):
        worker.start()


def test_what_opened_raises_passes_and_the_process_is_gone() -> None:
    def opened(frame: Frame) -> None:
        raise ZeroDivisionError

    worker = supervised(program("serve()"), opened=opened)
    with pytest.raises(ZeroDivisionError):
        worker.start()
    assert worker.pid is None


# --- memory ------------------------------------------------------------------------------------------------------------

TAKES = "taken()\nheld = []\nwhile True: held.append(bytearray(b'x' * (8 << 20)))"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses memory")
def test_the_system_refuses_more_than_the_limit() -> None:
    """The process itself sees it, and may say so."""
    refused = f"try:\n    {TAKES.replace(chr(10), chr(10) + '    ')}\nexcept MemoryError: held = []; say(whole('refused'))"
    worker = supervised(program("taken(); say(whole('ready'))", refused, "taken()"), most_memory=400 << 20)
    assert [reply.header.kind for reply in worker.ask([question()], 1, LONGEST_S)] == ["refused"]
    worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has taken")
def test_a_process_that_has_taken_more_is_ended() -> None:
    takes = TAKES.replace("while True", "while len(held) < 60") + "\ntime.sleep(999)"  # 480 MB
    worker = supervised(program("taken(); say(whole('ready'))", takes), most_memory=400 << 20, refuse=False)
    with pytest.raises(Died, match="it took more than its 0.419430 GB of memory".replace("0.419430", "0.41943")) as raised:
        list(worker.ask([question()], 1, LONGEST_S))
    assert raised.value.out_of_memory


def test_a_kill_while_memory_was_short_is_known_by_the_systems_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = supervised(faulty(tmp_path, "is killed", "breaks"))
    count = iter(range(10))  # one more each time it is read
    monkeypatch.setattr(memory, "kills", lambda: next(count))
    with pytest.raises(Died, match="^memory ran out$") as raised:
        list(worker.ask([question()], 1, LONGEST_S))
    assert raised.value.out_of_memory
    with pytest.raises(Died, match="signal 11") as raised:  # the system kills by signal 9
        list(worker.ask([question()], 1, LONGEST_S))
    assert not raised.value.out_of_memory


def test_memory_of_groups_and_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit counts, without what the system gives up when it must; the tightest of all of them holds."""
    files = {
        "proc/meminfo": "MemTotal:  16000 kB\nMemAvailable:  9000 kB\n",
        "proc/self/cgroup": "12:cpu:/x\n0::/pod/box\n",
        "groups/pod/box/memory.max": "max\n",
        "groups/pod/box/memory.current": "4096\n",
        "groups/pod/memory.max": "5000000\n",
        "groups/pod/memory.current": "3000000\n",
        "groups/pod/memory.stat": "anon 1\ninactive_file 500000\n",
        "proc/vmstat": "pgfault 7\noom_kill 3\n",
        "proc/41/status": "VmRSS: 900 kB\nRssAnon: 100 kB\nRssFile: 700 kB\nRssShmem: 20 kB\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    assert memory.available() == 5_000_000 - 3_000_000 + 500_000
    assert memory.kills() == 3
    assert memory.taken(41) == 120 << 10  # 100 + 20, without the 700 of mapped files
    assert memory.taken(42) == 0
    (tmp_path / "groups/pod/memory.max").write_text("max\n")
    assert memory.available() == 9000 << 10
    (tmp_path / "proc/meminfo").unlink()
    assert memory.available() is None


def test_what_this_machine_says_of_memory() -> None:
    assert memory.peak() > 10 << 20
    if sys.platform == "linux":
        assert 0 < memory.taken(os.getpid()) <= memory.peak()
        assert memory.available() > 0


# --- the end of the parent ---------------------------------------------------------------------------------------------

PARENT = """
import sys, time
from anyrank.messages.frame import Frame, Header
from anyrank.worker.supervisor import COMMAND, Supervised
command = tuple(sys.argv[1:]) or COMMAND
worker = Supervised(lambda: Frame(Header("setup"), {}), lambda frame: None, 1 << 30, command=command)
worker._begin()
print(worker.pid, flush=True)
time.sleep(999)
"""
WORKER = """
import itertools, signal, sys, time
from anyrank.worker import channel
taken = channel.take_over().start()
sys.stderr.write("ready")
open(sys.argv[1], "w").close()
"""
BUSY = {
    "sleeps": "time.sleep(999)",
    "waits for a frame": "taken.receive()",
    "hangs in C": "any(itertools.repeat(0))",
    "ignores signals": "[signal.signal(each, signal.SIG_IGN) for each in (1, 13, 15)]; time.sleep(999)",
}  # fmt: skip


def orphaned(tmp_path: Path, *command: str, when: Callable[[], bool] = lambda: True, patched: str = "") -> None:
    """Kill a parent when its worker is so far, and wait until the worker is gone, too."""
    path = os.environ.get("PYTHONPATH", "")
    if patched:
        (tmp_path / "patched").mkdir()
        (tmp_path / "patched" / "sitecustomize.py").write_text(patched)
        path = os.pathsep.join([str(tmp_path / "patched"), str(Path(supervisor.__file__).parents[2]), path])
    env = os.environ | {"ANYRANK_MARK": str(tmp_path), "PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *command], env=env, stdout=subprocess.PIPE)
    try:
        assert int(parent.stdout.readline())
        wait_until(when)
        assert len(marked(str(tmp_path))) == 2
        parent.kill()
        parent.wait()
        wait_until(lambda: not marked(str(tmp_path)), seconds=20)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for each in marked(str(tmp_path)):
            os.kill(each, signal.SIGKILL)


@pytest.mark.parametrize("busy", BUSY)
def test_a_worker_ends_with_its_parent_whatever_it_does(tmp_path: Path, busy: str) -> None:
    if busy == "hangs in C" and sys.platform != "linux":
        pytest.skip("only the system can end it")
    command = (sys.executable, "-c", WORKER + BUSY[busy], str(tmp_path / "far"))
    orphaned(tmp_path, *command, when=(tmp_path / "far").exists)


@pytest.mark.parametrize("moment", [0.0, 0.2, 1.0])
def test_a_worker_that_imports_ends_with_its_parent(tmp_path: Path, moment: float) -> None:
    began = time.monotonic()
    orphaned(tmp_path, when=lambda: time.monotonic() - began > moment)


LOST = {
    "the system's signal": "from anyrank import stopping\nstopping._KILL = 0\n",
    "the pipe": "from anyrank.worker import channel\nchannel.Channel._follow = lambda self: None\n",
}


@pytest.mark.skipif(sys.platform != "linux", reason="only here there are two ways")
@pytest.mark.parametrize("lost", LOST)
def test_either_way_to_end_with_the_parent_suffices(tmp_path: Path, lost: str) -> None:
    command = (sys.executable, "-c", WORKER + BUSY["sleeps"], str(tmp_path / "far"))
    orphaned(tmp_path, *command, when=(tmp_path / "far").exists, patched=LOST[lost])


def test_the_working_folder_gives_a_worker_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file there of the name of a module would take its place."""
    for name in ("queue", "signal", "numpy", "anyrank"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    worker = Supervised(lambda: Frame(Header("setup"), {}), lambda frame: None, LIMIT)
    with pytest.raises(Died, match="status 3; its last words: setup: expected the keys config, largest_rank, got none"):
        worker.start()

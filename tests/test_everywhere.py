"""What macOS and Windows do not have is not needed: the commands run without it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from anyrank.devices import cores
from anyrank.studies import comparison
from test_cli import wait_until

SOURCE = Path(__file__).resolve().parents[1] / "src"
CONFIG = '[run]\nname = "small"\nlabel = "größer"\nrounds = 2\n[model]\nname = "digits-mlp"\n[train]\nlocal_steps = 2\n'

# Loaded by every Python that finds it on its path, worker processes included, before anything else. Beside what is taken
# away: `getppid` never changes, only a file that is open for writing is flushed, and none is replaced or deleted that this
# process has open or mapped.
ELSEWHERE = """
import os, sys

sys.modules["fcntl"] = None
del os.sched_getaffinity, os.fchmod
parent, flush, replace, unlink = os.getppid(), os.fsync, os.replace, os.unlink


def fsync(descriptor):
    os.write(descriptor, b"")
    flush(descriptor)


def in_use(path):
    path = os.path.realpath(path)
    if os.path.basename(path).startswith(".lock"):  # filelock's own: what it does with it depends on the system
        return
    with open("/proc/self/maps", "rb") as maps:
        if os.fsencode(path) + b"\\n" in maps.read():
            raise PermissionError(f"{path} is mapped")
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == path:
            raise PermissionError(f"{path} is open")


def refusing_replace(source, target, **where):
    in_use(source), in_use(target)
    replace(source, target, **where)


def refusing_unlink(path, *, dir_fd=None):
    if dir_fd is None:
        in_use(path)
    unlink(path, dir_fd=dir_fd)


os.getppid, os.fsync = lambda: parent, fsync
if os.path.exists("/proc/self/maps"):
    os.replace, os.unlink = refusing_replace, refusing_unlink
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path, cache: Path) -> Iterator[Start]:
    """Starts Python in a folder with `digits.toml` in it, without what other systems lack, and with ASCII for its encoding."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("what is taken away here is not there")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sitecustomize.py").write_text(ELSEWHERE, encoding="utf-8")
    (tmp_path / "digits.toml").write_text(CONFIG, encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "elsewhere"), str(SOURCE)]),
        "ANYRANK_CACHE": str(cache),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"},
    }
    started = []

    def call(*arguments: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        started.append(subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, env=environment, **pipes))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()  # not for the end of its pipes: where a test has failed, workers may still hold them
        process.stdout.close()
        process.stderr.close()


def ended(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """What it printed, on stdout and on stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out, err


def test_the_commands_work_without_what_other_systems_lack(start: Start, tmp_path: Path) -> None:
    _, err = ended(start("-m", "anyrank", "run", "digits.toml", "--out", "run"))
    assert "arning" not in err
    assert 'label = "größer"' in (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    adapters = ("run/adapter-rank-2", "run/adapter-rank-4")
    ended(start("-m", "anyrank", "aggregate", *adapters, "--method", "raflora", "--ranks", "2", "--out", "merged"))
    ended(start("-m", "anyrank", "inspect", "merged/rank-2"))
    methods = ("--methods", "rbla,raflora:split=balanced")
    ended(start("-m", "anyrank", "compare", "digits.toml", *methods, "--jobs", "2", "--out", "grid"))
    assert sorted(path.parent.name for path in (tmp_path / "grid").glob("*/*/summary.json")) == ["seed-0"] * 2
    ended(start("-m", "anyrank", "report", "grid"))
    small = "from anyrank.cli import demo, main; demo.CONFIG = demo.CONFIG.replace(run={'rounds': 1}); main()"
    ended(start("-c", small, "demo", "--methods", "rbla", "--seeds", "1", "--out", "grid", "--jobs", "1"))


def test_the_library_works_without_what_other_systems_lack(start: Start) -> None:
    """A run that goes on replaces the checkpoint that it came from, and an adapter the files that it was read from."""
    ended(start("-m", "anyrank", "run", "digits.toml", "--out", "run"))
    program = """if True:
        from pathlib import Path
        from anyrank import Adapter, config, devices
        from anyrank.privacy import noise
        from anyrank.runs.folder import RunDir
        assert devices.cores() >= 1
        with RunDir.open("run", config.load("digits.toml"), resume=True) as store:
            state = store.restore()
            store.commit(state, store.metrics()[-1], store.clients()[-1:])
            adapter = Adapter.load("run/adapter")
            store.finish({"adapter": adapter}, {})
        assert noise.find_key(noise.keep_key(b"k" * 32)) == b"k" * 32
    """
    ended(start("-c", program))


LONG = ("-m", "anyrank", "run", "digits.toml", "--out", "long", "--set", "run.rounds=100000")


def test_a_second_process_on_a_run_is_refused_in_one_line_until_the_first_is_killed(start: Start, tmp_path: Path) -> None:
    first = start(*LONG)
    wait_until((tmp_path / "long" / "metrics.jsonl").exists, seconds=120)
    _, err = ended(start(*LONG, "--resume"), status=2)
    assert "long: another process is writing this run" in err
    assert "if there is none, it was killed: delete " in err, "the lock is no lock of the system here"
    assert err.count("\n") == 1
    first.kill()
    first.communicate()
    opened = "RunDir.open('long', config.load('digits.toml', ['run.rounds=100000']), resume=True).close()"
    ended(start("-c", f"from anyrank import config; from anyrank.runs.folder import RunDir; {opened}"))


def test_a_killed_grid_ends_its_workers_where_the_parents_id_never_changes(start: Start, tmp_path: Path) -> None:
    grid = start(
        *("-m", "anyrank", "compare", "digits.toml", "--methods", "rbla,raflora", "--jobs", "2", "--out", "grid"),
        *("--set", "run.rounds=100000"),
    )
    metrics = [tmp_path / "grid" / method / "seed-0" / "metrics.jsonl" for method in ("rbla", "raflora")]
    wait_until(lambda: all(path.exists() for path in metrics), seconds=120)
    grid.kill()
    grid.communicate(timeout=30)  # its workers have its stderr: it comes to an end when the last of them is gone


def test_cores_are_all_there_are_where_the_system_tells_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == os.cpu_count()


@pytest.mark.parametrize("label", ["raflora:split=balanced", 'a<b>c"d|e?f*g\\h', "ends.", "a%3Ab"])
def test_a_methods_folder_is_its_label_or_a_name_that_windows_takes(label: str) -> None:
    assert comparison.folder(label, windows=False) == label
    told = comparison.folder(label, windows=True)
    assert not set(told) & set('<>:"|?*\\')
    assert told[-1] not in ". "
    assert unquote(told) == label, "different labels have different folders"


# --- the source --------------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted((SOURCE / "anyrank").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text: `open` in a text mode, of whatever library, `read_text` or `write_text`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "open" and getattr(getattr(call.func, "value", None), "attr", "") in ("_inbox", "_posts"):
        return False  # methods of the engines' own objects, which are no files
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)  # else a function of ours, which calls one that is looked at
    if name in ("open", "fdopen") and owner in ("", "os", "gzip", "bz2", "lzma", "io") and (owner, name) != ("os", "open"):
        given = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        mode = given[0].value if given and isinstance(given[0], ast.Constant) else "r" if not given else None
        assert mode is not None, "a mode that can be read here"
        return "t" in mode if owner in ("gzip", "bz2", "lzma") else "b" not in mode
    if name in ("NamedTemporaryFile", "TemporaryFile"):  # binary where nothing is said
        given = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        return bool(given) and "b" not in getattr(given[0], "value", "")
    return name == "TextIOWrapper"


def test_every_text_file_names_its_encoding() -> None:
    """Windows would take another one than Linux and macOS."""
    texts = [(place, call) for place, call in calls() if opens_text(call)]
    assert len(texts) > 10, "it finds them"
    assert not [place for place, call in texts if "encoding" not in {keyword.arg for keyword in call.keywords}]


NOT_EVERYWHERE = {
    *("os.sched_getaffinity", "os.sched_setaffinity", "os.getppid", "os.fork", "os.killpg", "os.setsid", "os.uname"),
    *("os.getuid", "os.chown", "os.mkfifo", "os.posix_fadvise", "os.sysconf", "os.rename", "signal.SIGKILL", "signal.SIGALRM"),
}
ASKED_FOR = {  # what a file looks for, or for the system that has it, before it calls it
    ("training/deadline.py", "signal.SIGALRM"),
    ("stopping.py", "os.killpg"),
    ("parties/starting.py", "signal.SIGKILL"),
    ("worker/memory.py", "resource"),
    ("engines/flower/relay.py", "os.getuid"),
}
ONLY_POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "msvcrt", "winreg"}


def test_nothing_is_called_that_not_every_system_has() -> None:
    """`os.fchmod` is called where it exists. `os.rename` exists, but Windows does not rename over a file: `os.replace` does."""
    for path in sorted((SOURCE / "anyrank").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                asked = (path.relative_to(SOURCE / "anyrank").as_posix(), called) in ASKED_FOR
                assert called not in NOT_EVERYWHERE or asked, f"{path}:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            asked = {name for name in names if (path.relative_to(SOURCE / "anyrank").as_posix(), name) in ASKED_FOR}
            assert not (ONLY_POSIX & set(names)) - asked, f"{path}:{node.lineno}"

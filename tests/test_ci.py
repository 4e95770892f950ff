"""`.ci/run` installs a browser where it can, in a bounded time, and ends as `make test` ends, whatever becomes of that."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "run"
TOOLS = ("bash", "dirname", "timeout", "sleep")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason="needs bash and timeout; the script is for Debian's continuous integration"
)


def run(folder: Path, make: str = "exit 0", **commands: str) -> tuple[int, str, list[str], float]:
    """`.ci/run` with these shell commands alone in its path: its status, its stderr, what was called, and the seconds."""
    tools, calls = folder / "bin", folder / "calls"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    for name, body in {"make": make, **{key.replace("_", "-"): body for key, body in commands.items()}}.items():
        (tools / name).write_text(f'#!{tools}/bash\necho "{name} $*" >> "{calls}"\n{body}\n')
        (tools / name).chmod(0o755)
    repository = folder / "repository"
    (repository / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, repository / ".ci" / "run")
    began = time.monotonic()
    environment = {"PATH": str(tools), "ANYRANK_BROWSER_S": "1"}
    done = subprocess.run(
        [shutil.which("bash"), repository / ".ci" / "run"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr, calls.read_text().splitlines(), time.monotonic() - began


ROOT, USER = "echo 0", "echo 1000"


def test_a_browser_that_is_there_is_not_installed_again(tmp_path: Path) -> None:
    status, err, calls, _ = run(tmp_path, chromium="exit 0", apt_get="exit 0", id=ROOT)
    assert (status, err, calls) == (0, "", ["make test"])


def test_root_installs_it_and_the_tests_come_last(tmp_path: Path) -> None:
    status, err, calls, _ = run(tmp_path, apt_get="exit 0", id=ROOT)
    assert (status, err) == (0, "")
    assert [call.split()[0] for call in calls] == ["id", "apt-get", "apt-get", "make"]
    assert calls[1].endswith(" update")
    assert calls[2].endswith(" install -y --no-install-recommends chromium fonts-liberation")
    assert calls[3] == "make test"


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        ({"id": USER, "apt_get": "exit 0"}, "not root"),
        ({"id": ROOT}, "no apt-get here"),
        ({"id": ROOT, "apt_get": "echo no network >&2; exit 100"}, "apt-get could not install chromium"),
        ({"id": ROOT, "apt_get": "sleep 100"}, "apt-get could not install chromium"),
    ],
)
def test_where_it_cannot_be_installed_the_tests_run_and_the_reason_is_said(
    commands: dict[str, str], reason: str, tmp_path: Path
) -> None:
    status, err, calls, seconds = run(tmp_path, **commands)
    assert status == 0
    assert err == f"tests in a browser are skipped: {reason}\n"
    assert calls[-1] == "make test"
    assert seconds < 60


@pytest.mark.parametrize("apt_get", ["exit 0", "exit 1"])
def test_it_ends_as_the_tests_end(apt_get: str, tmp_path: Path) -> None:
    assert run(tmp_path, make="exit 7", apt_get=apt_get, id=ROOT)[0] == 7

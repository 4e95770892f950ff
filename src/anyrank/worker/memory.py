"""The memory of this machine and of a worker, as far as the system says it; all of it is known on Linux. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

STATUS = 12  # exit status of a worker whose memory ran out outside of a client's training
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def limit(process: int, size: int) -> bool:
    """Let the system refuse a process (0: this one) more than `size` bytes of memory of its own. Whether it does so: only
    Linux."""
    if sys.platform != "linux":
        return False
    import resource

    try:
        resource.prlimit(process, resource.RLIMIT_DATA, (size, size))
    except (OSError, ValueError):  # it is gone, or a lower limit holds already
        return False
    return True


def taken(process: int) -> int:
    """Bytes of memory that a process has of its own: without the files that it maps, which need none. 0 if it is not known."""
    found = _numbers(_PROC / str(process) / "status")
    return (found.get("RssAnon", 0) + found.get("RssShmem", 0)) << 10


def peak() -> int:
    """Bytes of memory that this process has taken at most. 0 if it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available() -> int | None:
    """Bytes that new processes can take here: of the machine, and of the control groups (of a container) that this one is in.

    `None` if it is not known.
    """
    free = _numbers(_PROC / "meminfo").get("MemAvailable")
    rooms = [_left(group) for group in _own_groups()]
    found = [size for size in (free << 10 if free is not None else None, *rooms) if size is not None]
    return min(found, default=None)


def kills() -> int:
    """How many processes the system has ended because memory was short, since it was started."""
    return _numbers(_PROC / "vmstat").get("oom_kill", 0)


def _own_groups() -> Iterator[Path]:
    """The folders of the control groups (version 2) of this process, from its own up to the root's."""
    lines = _text(_PROC / "self" / "cgroup").splitlines()
    path = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), None)
    if path is not None:
        own = _GROUPS / path
        yield from (own, *(parent for parent in own.parents if parent.is_relative_to(_GROUPS)))


def _left(group: Path) -> int | None:
    most, now = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if not most.isdigit() or not now.isdigit():
        return None
    cached = _numbers(group / "memory.stat").get("inactive_file", 0)  # the system gives these up when memory is needed
    return max(0, int(most) - int(now) + cached)


def _numbers(path: Path) -> dict[str, int]:
    """The lines of a file of the system that have a name and a number."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

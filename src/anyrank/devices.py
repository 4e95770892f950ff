"""Cores, devices and what they can do."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from anyrank.errors import ModelError

if TYPE_CHECKING:
    import torch

_TRIM_BYTES = 1 << 26

Item = TypeVar("Item")
Found = TypeVar("Found")


def cores() -> int:
    """The number of CPU cores that this process may use, at least 1; on macOS and Windows, the number of all cores."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def find(name: str, asked: str = "model.device") -> torch.device:
    """The device for the value of the key `asked`: `auto` is a GPU if torch finds one. Raises `ModelError` if it is missing."""
    import torch

    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in seen.items() if there))
    if not seen[name]:
        raise ModelError(
            f"{asked} = '{name}': torch {torch.__version__} sees no such device; install a build of torch for it, or set "
            f"{asked} to 'cpu' or 'auto'"
        )
    return torch.device(name)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of torch's CPU threads within a `with` block, because the order of additions depends on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_cores() -> contextlib.AbstractContextManager[None]:
    """Use every core that this process may use within a `with` block, for encoding."""
    return threads(cores())


def spread(items: Iterable[Item], compute: Callable[[Item], Found], take: Callable[[Item, Found], None]) -> None:
    """`take(item, compute(item))` of every item, in order, here; `compute` runs on all cores, each call on a single one.

    The order of additions within a call is therefore the same on every number of cores. At most two items per core wait at a
    time, so that `items` may be read as they are needed.
    """
    import torch

    waiting: deque[tuple[Item, Future[Found]]] = deque()
    with threads(1), ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(compute, item)))
                if len(waiting) > 2 * cores():
                    first, found = waiting.popleft()
                    take(first, found.result())
            while waiting:
                first, found = waiting.popleft()
                take(first, found.result())
        finally:
            for _, found in waiting:
                found.cancel()


def free_memory(device: torch.device) -> int | None:
    """Bytes of memory that this process could still take on the device: of a CPU, what Linux says is available, within the
    limit of its control group. `None` where the system does not say."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        free = [int(available[1]) << 10] if available else []
    except OSError:
        return None
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit: `max`
        group = Path("/sys/fs/cgroup")
        most, now = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        free.append(most - now)
    return max(0, min(free)) if free else None


def trim() -> None:
    """Give memory that was freed back to the system, where its allocator (glibc) would keep it for later: after many tensors
    of many sizes, that is more than what is in use. Takes about a millisecond."""
    if (give_back := _trimming()) is not None:
        give_back(0)


class Trimming:
    """`trim` whenever `_TRIM_BYTES` more have been freed: pages that were given back cost more than what is put in them."""

    def __init__(self) -> None:
        self._freed = 0

    def freed(self, size: int) -> None:
        self._freed += size
        if self._freed >= _TRIM_BYTES:
            self._freed = 0
            trim()


@functools.cache
def _trimming() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products."""
    import torch

    return _cpu_has_bfloat16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU has AVX-512 BF16, AMX, or ARM's BF16, as Linux lists them."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})

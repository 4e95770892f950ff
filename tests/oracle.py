"""The one promise of every door: success, or an `AnyRankError` in one line; within bounded time and memory; what was whole
stays whole. `tests/test_doors.py` and `tests/fuzz.py` judge by it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank.errors import AnyRankError, printable

SECONDS = 10.0  # for an action; the machine may be busy
MEMORY = 3 << 30  # bytes of addresses that an action may take beyond what the process has
LONGEST = 2000  # characters of a refusal
_HARD = 30.0  # seconds beyond `SECONDS` after which code that lets no signal through ends the process, with its stack


class Broken(AssertionError):
    """The promise is broken."""


class Late(BaseException):
    """Raised by the alarm: no `Exception`, so that nothing catches it as an error of its own."""


@dataclass(frozen=True)
class Outcome:
    """What an action gave, or the line by which it was refused."""

    value: Any = None
    refusal: str = ""


def outcome(
    act: Callable[[], Any],
    whole: Path | None = None,
    ignore: Callable[[str], bool] = lambda name: False,
    seconds: float = SECONDS,
) -> Outcome:
    """Run `act` and judge it. `whole`: a folder whose files stay as they are; names for which `ignore` is true may change.

    Raises `Broken` for anything but success or a refusal in one line.
    """
    before = contents(whole) if whole else {}
    try:
        with _alarm(seconds), _memory(MEMORY):
            found = Outcome(act())
    except AnyRankError as error:
        found = Outcome(refusal=_line(error))
    except Late as late:
        raise Broken(f"not done after {seconds:g} s, at {_place(late)}") from None
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            raise
        raise Broken(f"raised {type(error).__name__}: {str(error)[:500]!a}, at {_place(error)}") from error
    if whole:
        unchanged(before, contents(whole), ignore)
    return found


def refusal(act: Callable[[], Any], **options: Any) -> str:
    """The line by which `act` is refused; `Broken` where it is done."""
    found = outcome(act, **options)
    if not found.refusal:
        raise Broken(f"expected a refusal, got {found.value!r:.200}")
    return found.refusal


def contents(folder: Path) -> dict[str, Any]:
    """`{name: bytes of a file, target of a link, or kind of anything else}` of all that is at or below `folder`."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(root, name)
            mode = os.lstat(path).st_mode
            link = os.readlink(path) if stat.S_ISLNK(mode) else None
            found[os.path.relpath(path, folder)] = link or (
                Path(path).read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
            )
    return found


def unchanged(before: dict[str, Any], after: dict[str, Any], ignore: Callable[[str], bool] = lambda name: False) -> None:
    """Raise `Broken` for a file that was there and is not what it was, or that is new."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not ignore(name):
            how = "is new" if name not in before else "is gone" if name not in after else "has changed"
            raise Broken(f"{name!a} {how}")


def _line(error: AnyRankError) -> str:
    text = str(error)
    if not text.strip() or len(text) > LONGEST or text != printable(text) or len(text.splitlines()) != 1:
        raise Broken(f"a refusal that is no printable line of at most {LONGEST} characters: {text[:300]!a} ({len(text)})")
    return text


def _place(error: BaseException) -> str:
    """The last line of the library that the error went through."""
    trace, place = error.__traceback__, "?"
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if f"{os.sep}anyrank{os.sep}" in file:
            place = f"{file.rpartition(f'{os.sep}anyrank{os.sep}')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `Late` after so many seconds, and end the process where nothing can be raised."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, ring)
    with contextlib.suppress(Exception):  # where stderr is no file, as under some test runners
        faulthandler.dump_traceback_later(seconds + _HARD, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _memory(more: int) -> Iterator[None]:
    """Let the process take at most `more` bytes of addresses beyond those that it has."""
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: the alarm alone
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + more if hard == resource.RLIM_INFINITY else min(taken + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

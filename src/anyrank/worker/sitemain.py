"""The start of a site's worker: its file, its limits of memory, its store, and then the loop. No torch before the pipes are
taken over."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from anyrank.errors import AnyRankError
from anyrank.messages.frame import Frame, Header, read, write
from anyrank.worker import channel, sitefile
from anyrank.worker.supervisor import ERROR

_HEADER_BYTES = 16 << 20  # of a frame, beside its arrays
_WAIT_S = 10.0  # for the first question, where the site file cannot be used
_GB = 1_000_000_000


def main(path: str) -> int:
    """Serve the site of the file at `path`; 2 if it, or its store, cannot be used."""
    try:
        site = sitefile.load(path)
        _limit_memory(site.limits.memory_gb)
    except AnyRankError as error:
        return _refused(error, "site file")
    taken = channel.take_over(site.limits.download_bytes + _HEADER_BYTES)  # before anything is imported that may print
    from anyrank.worker import serve
    from anyrank.worker.site import SiteDesk

    try:
        desk = SiteDesk(site)
    except AnyRankError as error:
        print(error, file=sys.stderr, flush=True)
        taken.receive()
        taken.send(_error("store"))
        return 2
    return serve.serve(taken, desk)


def _refused(error: AnyRankError, what: str) -> int:
    """One line for the operator on stderr; whoever asks gets an error without it, if a question comes soon."""
    print(error, file=sys.stderr, flush=True)
    answering = threading.Thread(target=_answer, args=(what,), daemon=True)
    if not sys.stdin.isatty():
        answering.start()
        answering.join(_WAIT_S)
    return 2


def _answer(what: str) -> None:
    with contextlib.suppress(AnyRankError, OSError):
        read(os.fdopen(os.dup(0), "rb", buffering=0), _HEADER_BYTES)
        with os.fdopen(os.dup(1), "wb") as sink:
            write(sink, _error(what))


def _error(what: str) -> Frame:
    text = f"{what}: the site cannot take part; its operator finds the reason in what its worker has printed"
    return Frame(Header(ERROR, body={"kind": "RunError", "text": text}), {})


def _limit_memory(gigabytes: float) -> None:
    """Let allocations fail beyond the limit, where the system can do so: the reply is then one of memory that ran out."""
    if not gigabytes:
        return
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = int(gigabytes * _GB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

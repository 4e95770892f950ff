"""The start of a site's worker: its file, its limits of memory, its store, and then the loop. No torch before the pipes are
taken over."""

from __future__ import annotations

import sys

from anyrank.errors import AnyRankError
from anyrank.messages.frame import Frame, Header
from anyrank.worker import channel, memory, sitefile
from anyrank.worker.supervisor import ERROR

_HEADER_BYTES = 16 << 20  # of a frame, beside its arrays
_WAIT_S = 10.0  # for the first question, where the site file or the store cannot be used
_GB = 1_000_000_000


def main(path: str) -> int:
    """Serve the site of the file at `path`; 2 if it, or its store, cannot be used."""
    try:
        site = sitefile.load(path)
    except AnyRankError as error:
        _say(str(error))
        if not sys.stdin.isatty():
            channel.take_over(_HEADER_BYTES).refuse(_error("site file"), _WAIT_S)
        return 2
    if site.limits.memory_gb and not memory.limit(0, int(site.limits.memory_gb * _GB)):
        _say(f"{path}: limits.memory_gb: this system cannot limit the memory of a process; it is not limited")
    taken = channel.take_over(site.limits.download_bytes + _HEADER_BYTES)  # before anything is imported that may print
    from anyrank.worker import serve
    from anyrank.worker.site import SiteDesk

    try:
        desk = SiteDesk(site)
    except AnyRankError as error:
        _say(str(error))
        taken.refuse(_error("store"), _WAIT_S)
        return 2
    return serve.serve(taken.start(), desk)


def _say(line: str) -> None:
    """To the operator of the site. Whoever asks gets none of it."""
    print(line, file=sys.stderr, flush=True)


def _error(what: str) -> Frame:
    text = f"{what}: the site cannot take part; its operator finds the reason in what its worker has printed"
    return Frame(Header(ERROR, body={"kind": "RunError", "text": text}), {})

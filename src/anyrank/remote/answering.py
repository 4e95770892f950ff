"""A site's side of one question: checks before the worker gets it, and codes for what goes wrong with it. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from anyrank.errors import FrameError
from anyrank.messages.frame import Frame
from anyrank.remote.parcels import OPEN, Code, Question, plain
from anyrank.worker.supervisor import Died, Late

_SETUP = "setup"  # the kind of the frame that opens a worker
_KINDS = ("cohort", "download", "start", "evaluate")  # the kinds of all others


class Unanswered(Exception):
    """A question without a reply: the code that leaves the site, and the text that does not."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


class _Changed(Exception):
    """A worker that was started anew answers the opening otherwise than the first one."""


def check_site(asked: Question, site: str) -> None:
    """Raise `FrameError` for a question to another site."""
    if asked.site != site:
        raise FrameError(f"question: expected one to {site}, got one to {asked.site}")


def check_frames(asked: Question, site: str, frames: Sequence[Frame]) -> None:
    """Raise `FrameError` unless the frames of a question are for this site, and what the question is said to be."""
    kinds = (_SETUP,) if asked.kind == OPEN else _KINDS
    if not frames or (asked.kind == OPEN and len(frames) > 1):
        raise FrameError(f"question: expected at least one frame, and one alone to open a worker, got {len(frames)}")
    for header in (frame.header for frame in frames):
        if header.kind not in kinds or header.client not in ("", site):
            raise FrameError(f"question: expected {' or '.join(kinds)} for {site}, got {header.kind} for {header.client}")
        if header.run != asked.run or header.round not in (0, asked.round):
            raise FrameError(f"question: expected run {asked.run} and round {asked.round}, got {header.run} and {header.round}")


@contextlib.contextmanager
def coded() -> Iterator[None]:
    """Within it, what goes wrong with a worker is `Unanswered`, with its code."""
    try:
        yield
    except Died as error:
        raise Unanswered(Code.DIED, str(error)) from None
    except Late as error:
        raise Unanswered(Code.LATE, str(error)) from None
    except _Changed:
        raise Unanswered(Code.CHANGED, "its worker, started anew, answers the opening otherwise") from None


def same(came: list[Frame]) -> Callable[[Frame], None]:
    """What takes a worker's reply to the opening: the first one is kept in `came`, and all later ones have to equal it."""

    def opened(reply: Frame) -> None:
        if came and plain(came[0]) != plain(reply):
            raise _Changed
        came[:] = came or [reply]

    return opened

"""A site's store: what of a run stays at the site, the replies that may be sent again, and the folder of its privacy ledger.

    site.json                 whose store this is, and how many charges were answered at least
    ledger.jsonl, ledger.json the privacy ledger (`anyrank.privacy.grant`)
    runs/KEY/index.json       the rounds of one run of one federation whose own parts are kept, with their files' digests
    runs/KEY/own-*.frame      an adapter after the training of a round, as a frame
    replies/*.frame           the last private replies, by the digest of what was asked

Every file is written whole. A run's index is written last: an adapter that it does not name was never committed and is removed.
What it names must be there unchanged, so that damage is an error in one line and never a fresh start. The number of charges in
`site.json` and in the names of replies finds a ledger of which an older copy was put back. What cannot be found: an older copy
of the whole folder, or an empty folder in its place.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank import files
from anyrank.adapter.adapter import Adapter
from anyrank.errors import FrameError, RunError, RunFailed
from anyrank.messages import body
from anyrank.messages.body import Packing, Parts, expect, fields
from anyrank.messages.frame import Frame, Header, from_bytes, to_bytes
from anyrank.messages.records import EVERYTHING
from anyrank.runs import lock

SITE, RUNS, REPLIES, INDEX = "site.json", "runs", "replies", "index.json"
OWN = "own"  # the kind of frame of an adapter that stays at the site
KEPT = 4  # rounds of a run whose own parts are kept: a server may resume some rounds back
MOST_REPLIES = 8
_MOST_INDEX_BYTES = 1 << 20
_REPLY = re.compile(r"(\d{1,9})-([0-9a-f]{64})-([0-9a-f]{32})\.frame")  # charge, request, reply


@dataclass(frozen=True)
class Generation:
    """The own parts after one round: the file that has them, and its digest."""

    round: int
    file: str
    digest: str


class Store:
    """The store in `folder` of the site `name`. One worker at a time has it; raises `RunError` if another one does, if it is
    another site's, or if it is damaged."""

    def __init__(self, folder: Path, name: str, most_bytes: int, most_runs: int) -> None:
        self.folder, self.name, self.most_bytes, self.most_runs = folder, name, most_bytes, most_runs
        files.make_folder(folder, mode=0o700)
        self._lock = _taken(folder)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        self._lock.release()

    # --- own parts of adapters ---

    def own(self, key: str, round: int) -> Adapter | None:
        """The run's own parts after its last training before `round`; `None` if it never trained before `round`.

        Raises `RunError` if they are damaged, or if they are no longer kept: a training that starts anew instead would be
        another one.
        """
        index = self._index(key)
        if index is None or round <= index["first"]:
            return None
        earlier = [each for each in index["kept"] if each.round < round]
        if not earlier:
            oldest = min((each.round for each in index["kept"]), default=0)
            raise RunError(
                f"{self._run(key)}: has the own parts from round {oldest} on, and was asked to continue before round {round}; "
                "start that run anew under another name"
            )
        return self._read(key, max(earlier, key=lambda each: each.round))

    def keep(self, key: str, round: int, adapter: Adapter, about: Mapping[str, Any]) -> None:
        """Keep the own parts after `round`. Those of this and of later rounds are removed: the run went back, and goes another
        way. `about`: which run this is, for the operator."""
        folder, index = self._run(key), self._index(key)
        data = to_bytes(_framed(adapter, key, round))
        digest = hashlib.sha256(data).hexdigest()
        self.check_room(len(data), index is None)
        generation = Generation(round, f"own-{round}-{digest[:16]}.frame", digest)
        before = [each for each in index["kept"] if each.round < round] if index else []
        first = min(round, index["first"]) if index else round
        if index is None:
            files.make_folder(folder)
            self._write_index(key, first, [], about)
        if not (folder / generation.file).exists():
            files.write_whole(folder / generation.file, lambda path: path.write_bytes(data))
        kept = [*before, generation][-KEPT:]
        self._write_index(key, first, kept, about)
        self._sweep(folder, {each.file for each in kept})

    def _read(self, key: str, generation: Generation) -> Adapter:
        path = self._run(key) / generation.file
        try:
            data = files.read_bounded(path, self.most_bytes)
            if hashlib.sha256(data).hexdigest() != generation.digest:
                raise FrameError("its digest is another one")
            return _unframed(from_bytes(data, self.most_bytes), key, generation.round)
        except (OSError, FrameError) as error:
            raise _damaged(path, str(error)) from None

    def _index(self, key: str) -> dict[str, Any] | None:
        """`{"first": the first round, "kept": generations}` of a run; `None` if nothing of it is kept."""
        folder = self._run(key)
        if not folder.exists():
            return None
        path = folder / INDEX
        try:
            _, first, listed = fields(INDEX, _sealed_table(path), about=dict, first=int, kept=list)
            kept = [Generation(*fields("kept", each, round=int, file=str, digest=str)) for each in listed]
            if [each.round for each in kept] != sorted({each.round for each in kept}):
                raise ValueError("its rounds are not in order")
        except FileNotFoundError:
            if not any(folder.glob("own-*")):  # the worker was ended before anything was kept
                return None
            raise _damaged(path, "it is gone") from None
        except (OSError, ValueError, FrameError) as error:
            raise _damaged(path, str(error)) from None
        return {"first": first, "kept": kept} if kept else None

    def _write_index(self, key: str, first: int, kept: list[Generation], about: Mapping[str, Any]) -> None:
        table = {"about": dict(about), "first": first, "kept": [vars(each) for each in kept]}
        _write_sealed(self._run(key) / INDEX, table)

    def _run(self, key: str) -> Path:
        return self.folder / RUNS / key

    def check_room(self, more: int, new: bool = False) -> None:
        """Raise `RunFailed` if the store has no room for `more` bytes, or for a `new` run."""
        runs = self.folder / RUNS
        count = len(files.contents(runs))
        if new and count >= self.most_runs:
            raise RunFailed(f"{runs}: has {count} runs, the most that store.runs allows; remove those that are over")
        size = sum(path.stat().st_size for path in files.walk(self.folder))
        if size + more > self.most_bytes:
            raise RunFailed(f"{self.folder}: has {size:,} bytes, store.megabytes allows {self.most_bytes:,}; remove old runs")

    @staticmethod
    def _sweep(folder: Path, kept: set[str]) -> None:
        files.sweep(folder)
        for path in files.contents(folder):
            if path.name.startswith("own-") and path.name not in kept:
                files.remove(path)

    # --- replies ---

    def reply(self, request: str) -> bytes | None:
        """The reply to a request of this digest, as it was sent, or about to be; `None` if it is not kept."""
        for path in files.contents(self.folder / REPLIES):
            found = _REPLY.fullmatch(path.name)
            if found and found[2] == request:
                return self._read_reply(path, found[3])
        return None

    def keep_reply(self, request: str, charge: int, data: bytes) -> None:
        """Keep a reply before it is sent. `charge`: the number of its charge in the ledger."""
        folder = self.folder / REPLIES
        self.check_room(len(data))
        files.make_folder(folder)
        name = f"{charge}-{request}-{hashlib.sha256(data).hexdigest()[:32]}.frame"
        files.write_whole(folder / name, lambda path: path.write_bytes(data))
        self._write_site(charge)
        kept = sorted(_charges(folder).items())[:-MOST_REPLIES]
        for _, path in kept:
            files.remove(path)

    def _read_reply(self, path: Path, digest: str) -> bytes:
        try:
            data = files.read_bounded(path, self.most_bytes)
        except OSError as error:
            raise _damaged(path, str(error)) from None
        if hashlib.sha256(data).hexdigest()[:32] != digest:
            raise _damaged(path, "its digest is another one")
        return data

    def check_charges(self, charges: int) -> None:
        """Raise `RunError` if replies were charged that the ledger, of so many `charges`, does not have."""
        answered = max([self._answered, *_charges(self.folder / REPLIES)])
        if answered > charges:
            raise RunError(
                f"{self.folder}: the privacy ledger has {charges} charges, and charge {answered} was answered: it is an older "
                "copy; restore the newest one, or take no more part in private runs with this data"
            )

    # --- the folder itself ---

    def _open(self) -> None:
        files.sweep(self.folder)
        for name in (RUNS, REPLIES):
            files.make_folder(self.folder / name)
        for folder in (self.folder / REPLIES, *files.contents(self.folder / RUNS)):
            files.sweep(folder)
        path = self.folder / SITE
        self._answered = 0
        try:
            name, self._answered = fields(SITE, _sealed_table(path), site=str, answered=int)
        except FileNotFoundError:
            if any(self.folder.glob("ledger.json*")) or any((self.folder / RUNS).iterdir()):
                raise _damaged(path, "it is gone") from None
            return self._write_site(0)
        except (OSError, ValueError, FrameError) as error:
            raise _damaged(path, str(error)) from None
        if name != self.name:
            raise RunError(
                f"{self.folder}: is the store of site {name}, not of {self.name}; give each site a folder of its own"
            )

    def _write_site(self, answered: int) -> None:
        self._answered = max(self._answered, answered)
        _write_sealed(self.folder / SITE, {"site": self.name, "answered": self._answered})


def _taken(folder: Path) -> Any:
    try:
        return lock.take(folder)
    except RunError:
        raise RunError(
            f"{folder}: another worker uses this store; end it first, or give each site a folder of its own"
        ) from None


def _charges(folder: Path) -> dict[int, Path]:
    """The replies that are kept, by the number of their charge."""
    found = {path: _REPLY.fullmatch(path.name) for path in files.contents(folder)}
    return {int(match[1]): path for path, match in found.items() if match}


def _framed(adapter: Adapter, key: str, round: int) -> Frame:
    packing = Packing()
    body.pack(packing, "", adapter, EVERYTHING)
    return packing.frame(Header(OWN, key, round, body={"adapter": body.describe(adapter)}))


def _unframed(frame: Frame, key: str, round: int) -> Adapter:
    expect(frame, OWN, run=key, round=round)
    (table,) = fields(OWN, dict(frame.header.body), adapter=dict)
    parts = Parts(frame)
    adapter = body.unpack(parts, "", table, frozenset(), None)
    parts.finish()
    return adapter


def _write_sealed(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table with its digest."""
    text = json.dumps(table, sort_keys=True)
    files.write_whole_text(path, json.dumps({"noted": table, "digest": hashlib.sha256(text.encode()).hexdigest()}) + "\n")


def _sealed_table(path: Path) -> dict[str, Any]:
    """The table that `_write_sealed` wrote. Raises `ValueError` and `FrameError` for another one, and `OSError`."""
    whole = files.parse_json(files.read_bounded(path, _MOST_INDEX_BYTES))
    table, digest = fields(path.name, whole, noted=dict, digest=str)
    if hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest() != digest:
        raise ValueError("its digest is another one")
    return table


def _damaged(path: Path, what: str) -> RunError:
    return RunError(f"{path}: damaged ({what}); restore the store from a copy, or remove this run's folder to start it anew")

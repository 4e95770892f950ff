"""Collect the replies of a round: each reply is checked, and each reply and each client gets a row in the log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyrank import devices
from anyrank.errors import printable, shortened
from anyrank.federation import guard
from anyrank.federation.asking import Skipped
from anyrank.federation.reported import Reporting
from anyrank.messages.records import Client, ClientUpdate, Counts, Failure, Job, ServerState, Unreadable
from anyrank.messages.spooled import is_kept
from anyrank.robust.base import Rule, Screened

_LONGEST, _LONGEST_REASON = 100, 500  # letters of a name, and of a reason, that nobody here gave


@dataclass
class Collected:
    """The result of collecting one round: the accepted updates, a log row for each client of the cohort and for each stray
    reply, and the bytes in both directions. `reporting`: who reports scores; `counts`: what they reported, by client.
    """

    round: int
    reporting: Reporting | None = None
    counts: dict[str, Counts] = field(default_factory=dict)
    updates: list[ClientUpdate] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    upload_bytes: int = 0
    download_bytes: int = 0

    def count(self, *statuses: str) -> int:
        return sum(row["status"] in statuses for row in self.rows)

    def judge(self, reply: Any, job: Job, bound: float) -> None:
        """Let the guard see the first reply to `job`, count its bytes, and write its row."""
        row = self._judged(reply, job, bound)
        self.download_bytes += job.download.download_bytes()
        job.settle()
        self.rows.append(row)

    def _judged(self, reply: Any, job: Job, bound: float) -> dict[str, Any]:
        try:
            if isinstance(reply, Failure):
                return self._row(job.client, job.num_examples, "failed", _reason(reply))
            if isinstance(reply, Unreadable):
                raise guard.Rejected(shortened(printable(reply.reason), _LONGEST_REASON))
            update = guard.admit(reply, job.download, job.client.name, job.num_examples, bound)
            counts = self.reporting.admit(update.client, reply.counts) if self.reporting else None
            self.upload_bytes += job.download.upload_bytes(update.adapter)
        except guard.Rejected as reason:
            return self._row(job.client, job.num_examples, "rejected", str(reason))
        except Exception as error:  # a reply may be anything, and break in ways of its own
            reason = f"expected a client's update, got what cannot be read as one ({shortened(type(error).__name__, 100)})"
            return self._row(job.client, job.num_examples, "rejected", reason)
        self.updates.append(update)
        if is_kept(update.adapter):  # its layers were read one by one
            devices.trim()
        self.counts |= {update.client: counts} if counts else {}
        known = {key: update.metrics.get(key) for key in ("loss", "seconds")}
        return self._row(job.client, job.num_examples, "ok", "") | known

    def silent(self, job: Job) -> None:
        """The row of a client that sent nothing."""
        self.download_bytes += job.download.download_bytes()
        job.settle()
        self.rows.append(self._row(job.client, job.num_examples, "failed", "sent nothing"))

    def skipped(self, skipped: Skipped) -> None:
        """The row of a client that was skipped."""
        self.rows.append(self._row(skipped.client, skipped.num_examples, "skipped", skipped.reason))

    def stray(self, name: str, reason: str) -> None:
        """The row of an unexpected reply."""
        self.rows.append(self._row(Client(name, 0), None, "stray", reason) | {"rank": None})

    def carried(self, client: Client, num_examples: int, reason: str) -> None:
        """The row of a reply of the round before; `reason`: why it is left out (empty: it counts)."""
        status, told = ("late", f"its reply of round {self.round - 1} is left out: {reason}") if reason else ("ok", "")
        self.rows.append(self._row(client, num_examples, status, told or f"its reply of round {self.round - 1} counts"))
        self.rows.sort(key=lambda row: row["client"])

    def limit(self, rule: Rule, state: ServerState, jobs: Sequence[Job]) -> None:
        """Let `rule` shorten or reject the updates that arrived, and record it."""
        screened = rule.screen(state, jobs, self.updates)
        self.updates = list(screened.updates)
        self.screened(screened)

    def screened(self, screened: Screened) -> None:
        """Record whose updates a rule refused, and whose steps it shortened."""
        for row in self.rows:
            name = row["client"]
            if row["status"] == "ok" and name in screened.rejected:
                self.counts.pop(name, None)
                row |= {"status": "rejected", "reason": screened.rejected[name]}
            elif row["status"] == "ok" and name in screened.refused:
                row |= {"status": "excluded", "reason": screened.refused[name]}
            elif row["status"] == "ok" and name in screened.shortened:
                share = float(f"{screened.shortened[name]:.3g}")
                row |= {"shortened": share, "reason": f"its step was shortened to {share:g} of its length (guard.norm)"}

    def _row(self, client: Client, num_examples: int | None, status: str, reason: str) -> dict[str, Any]:
        figures = {"num_examples": num_examples, "loss": None, "seconds": None, "shortened": None}
        return {"round": self.round, "client": client.name, "rank": client.rank, **figures, "status": status, "reason": reason}


def collect(
    replies: Iterable[Any],
    jobs: Sequence[Job],
    skipped: Sequence[Skipped],
    round: int,
    bound: float = math.inf,
    reporting: Reporting | None = None,
) -> Collected:
    """Pass each reply through the guard. Only the first reply of a client counts, even if it is rejected.

    A second reply, a reply of an unknown sender, a late reply and a reply without a readable name are rows of status `stray`.
    `reporting`: the clients whose scores are kept; a reply whose scores cannot be believed is rejected.
    """
    collected, awaited = Collected(round, reporting), {job.client.name: job for job in jobs}
    asked = set(awaited)
    for reply in replies:
        name = _sender(reply)
        if name in awaited:
            collected.judge(reply, awaited.pop(name), bound)
        elif name in asked:
            collected.stray(name, "a second reply in this round: the first one counts")
        else:
            collected.stray(_readable(name), "unexpected: its sender has no job in this round")
    for job in awaited.values():
        collected.silent(job)
    for each in skipped:
        collected.skipped(each)
    collected.rows.sort(key=lambda row: row["client"])
    return collected


def _sender(reply: Any) -> str:
    """The name that a reply gives, or empty."""
    try:
        name = reply.client
    except Exception:  # whatever it is, it has no name that can be read
        return ""
    return name if type(name) is str else ""


def _readable(name: str) -> str:
    """A name that nobody here gave, as a log can bear it."""
    return shortened(printable(name[:_LONGEST]), _LONGEST)


def _reason(failure: Failure) -> str:
    """What a client says of its failure, as one line that a log can bear."""
    return shortened(printable(str(failure)), _LONGEST_REASON)

"""One line of what `anyrank deploy doctor` says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's. `what` was looked at, `ok` or not, and the `words` for it: what is there, or how to fix it.
    `warns`: it works now, and soon may not."""

    what: str
    ok: bool
    words: str
    warns: bool = False

    @property
    def mark(self) -> str:
        return "ok" if self.ok and not self.warns else "soon" if self.ok else "wrong"

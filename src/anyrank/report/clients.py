"""The page's tables of clients: their ranks, their participation, and the updates that were not used."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from anyrank.errors import shortened
from anyrank.report import words
from anyrank.report.groups import Group
from anyrank.report.runs import Run, finite

_MOST_REASONS = 20


def federations(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One table of participation for each set of clients; labels with the same clients and ranks share a table."""
    together: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        together[tuple(group.runs[0].ranks.items())].append(group)
    tables = []
    for held, members in together.items():
        runs = [run for group in members for run in group.runs]
        rows = [_rank_row(rank, count, runs) for rank, count in held]
        for row in rows:
            row["share"] = row["count"] / max(row["count"] for row in rows)
            row["used_share"] = row["used"] / (max(row["used"] for row in rows) or 1)
        if rows:
            tables.append(
                {
                    "of": words.joined(group.label for group in members),
                    "runs": len(runs),
                    "rows": rows,
                    "examples": _examples(runs),
                }
            )
    return tables


def _rank_row(rank: int, count: int, runs: Sequence[Run]) -> dict[str, Any]:
    used = sum(run.taking_part.used.get(rank, 0) for run in runs) / len(runs)
    sizes = [size for run in runs for size in run.taking_part.sizes.get(rank, ())]
    return {
        "rank": rank,
        "count": count,
        "used": used,
        "used_text": f"{round(used, 1):g}",
        "examples": f"{statistics.median(sizes):g}" if sizes else "–",
    }


def _examples(runs: Sequence[Run]) -> str:
    for run in runs:
        sizes = run.summary.get("examples")
        if isinstance(sizes, Mapping) and all(finite(sizes.get(key)) is not None for key in ("min", "median", "max")):
            seed = "" if run.seed is None else f" (seed {run.seed})"
            low, middle, high = (f"{sizes[key]:g}" for key in ("min", "median", "max"))
            return f"Examples per client{seed}: minimum {low}, median {middle}, maximum {high}."
    return ""


def rejections(groups: Sequence[Group]) -> dict[str, Any]:
    """Updates that were not used, by status and reason; reasons are compared without the client's name and the round."""
    found: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for group in groups:
        for row in (row for run in group.runs for row in run.taking_part.unused):
            found[str(row["status"]), _reason(row)].append((group.label, row))
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = []
    for (status, reason), hits in ordered[:_MOST_REASONS]:
        by_label = Counter(label for label, _ in hits)
        clients = sorted({shortened(row["client"], 60) for _, row in hits})
        labels = ", ".join(f"{label} {times}" for label, times in by_label.most_common())
        span = _span([row for _, row in hits])
        rows.append(
            {
                "status": status,
                "reason": reason,
                "times": len(hits),
                "labels": labels,
                "clients": words.few(clients),
                "rounds": span,
            }
        )
    known = any(run.taking_part.ranks for group in groups for run in group.runs)
    return {"rows": rows, "more": len(ordered) - len(rows), "known": known}


def _reason(row: Mapping[str, Any]) -> str:
    reason = str(row.get("reason") or "no reason recorded")
    reason = re.sub(rf"(?<!\w){re.escape(row['client'])}(?!\w)", "…", reason) if row["client"] else reason
    return re.sub(r"\bround \d+", "round …", reason)


def _span(rows: Sequence[Mapping[str, Any]]) -> str:
    rounds = [int(number) for row in rows if (number := finite(row.get("round"))) is not None]
    return "" if not rounds else f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)}–{max(rounds)}"

"""The privacy statement of each finished private run: the same text as `anyrank privacy RUN --statement` prints."""

from __future__ import annotations

from collections.abc import Sequence

from anyrank.privacy import statement
from anyrank.privacy.statement import Section
from anyrank.report.groups import Group

_MOST = 20  # that a page shows


def statements(groups: Sequence[Group]) -> list[tuple[str, list[Section]]]:
    """A heading and the parts of a statement for the runs of each label that have one."""
    found = []
    for run in (run for group in groups for run in group.runs):
        facts = statement.of_summary(run.config, run.summary)
        if facts is not None and len(found) < _MOST:
            seed = "" if run.seed is None else f", seed {run.seed}"
            found.append((f"Privacy statement of {run.label}{seed}", statement.sections(facts)))
    return found

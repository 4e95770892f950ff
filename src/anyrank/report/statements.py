"""The privacy statement of each finished private run: the same text as `anyrank privacy RUN --statement` prints."""

from __future__ import annotations

from collections.abc import Sequence

from anyrank.errors import AnyRankError
from anyrank.privacy import statement
from anyrank.privacy.statement import Section
from anyrank.report.groups import Group
from anyrank.report.runs import Run, section
from anyrank.runs import spending

_MOST = 20  # that a page shows
# The reason has paths of this machine in it, and a page is given to others.
_NONE = Section(
    "No statement",
    ("What this run has spent cannot be computed from its folder; anyrank privacy RUN --statement prints the reason.",),
)


def statements(groups: Sequence[Group]) -> list[tuple[str, list[Section]]]:
    """A heading and the parts of a statement for the finished private runs of each label."""
    finished = (run for group in groups for run in group.runs if run.finished)
    private = [run for run in finished if section(run.config, "privacy").get("level", "none") != "none"]
    return [(f"Privacy statement of {run.label}{_seed(run)}", _sections(run)) for run in private[:_MOST]]


def _seed(run: Run) -> str:
    return "" if run.seed is None else f", seed {run.seed}"


def _sections(run: Run) -> list[Section]:
    try:
        return statement.sections(spending.facts(run.folder))
    except AnyRankError:
        return [_NONE]

"""From the accepted updates of a round to the state after it: screen, quorum, merge, score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anyrank.errors import RunFailed
from anyrank.federation.asking import Work
from anyrank.federation.checks import Unhealthy, check_loss, merge
from anyrank.federation.federation import Federation
from anyrank.federation.figures import score
from anyrank.federation.intake import Collected
from anyrank.federation.quorum import Quorum
from anyrank.federation.standing import Standing
from anyrank.messages.records import Job, ServerState
from anyrank.robust.base import Rule, TooFew


@dataclass(frozen=True)
class Advanced:
    """The state after a round, its `standing` if it was scored, and why the round was `idle` (empty: it was not)."""

    state: ServerState
    standing: Standing | None
    idle: str = ""


def advance(
    federation: Federation, rule: Rule, state: ServerState, work: Work, jobs: Sequence[Job], collected: Collected
) -> Advanced:
    """The state after a round with this `work`; `jobs` are those that count for it. What the rule refuses or shortens is
    recorded in `collected`.

    The state stays as it was, for one more round, below the quorum, with fewer updates than the rule needs, and if the merge is
    not healthy. Raises `RunFailed` in the last case if `guard.rollback` is false.
    """
    config, round = federation.config, state.round + 1
    quorum = Quorum(config.rounds.least, config.rounds.share)
    try:
        idle = quorum.lacking(rule.usable(jobs, collected.updates), len(work.asked), collected.rows)
        if not idle:
            offenders = collected.count("rejected") + len(work.jobs) - len(work.asked)  # the latter rest, for earlier ones
            screened = rule.without(offenders).screen(state, jobs, collected.updates)
            collected.screened(screened)
            idle = "" if screened.updates or not jobs else f"{config.robust.rule} left no update"
        if not idle:
            after = merge(rule, federation.method, state, screened.updates)
            scored = check_loss(federation, score(federation, after)) if federation.scores(round) else None
            return Advanced(after, scored)
    except TooFew as reason:
        idle = str(reason)
    except Unhealthy as reason:
        if not config.guard.rollback:
            raise RunFailed(f"round {round}: {reason}") from None
        idle = str(reason)
    kept = replace(state, round=round)
    return Advanced(kept, score(federation, kept) if federation.scores(round) else None, idle)

"""Commands to a federation's server: submit, status, stop, resume. A run is a line of jobs on the server, and one folder there.

The owner's kit keeps what was submitted, so that a run can be resumed, and so that a run's name means one configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from anyrank import config as configs
from anyrank.config.federation import check_sites
from anyrank.config.sections import Config
from anyrank.config.tables import to_table
from anyrank.engines.nvflare import session
from anyrank.engines.nvflare.session import Commands, Job, Unreached
from anyrank.errors import DeployError, RunFailed, nearest
from anyrank.files import make_folder, write_whole_text
from anyrank.parties import kits, looking
from anyrank.parties.kits import Kit
from anyrank.parties.policies import OWNER, SERVER, VIEWER

LOOK_S = 5.0  # between two looks at the server
ROUNDS = "anyrank.deployment.nvflare.Rounds"  # the class that runs the rounds, in the server's job
_LOST_S = 10.0  # that a job is seen lost before it counts as lost: one that ends is so while the server stores its results
_MOST_LOST = 3  # jobs in a row that were lost without a further round, after which a supervisor gives up
_SUBMITTED = "submitted"  # the folder in a kit's state
_SEEN_S = 60.0  # seconds after which a site that was not heard of counts as away
_STOP_S, _STOP_LOOK_S = 60.0, 0.5  # that a job may take to end after it was stopped; between two looks at it
_MOST_REASONS = 5  # runs that are over whose own words a status asks for: each is a download
_AWAY_S = 120.0  # seconds that a server may be away before a supervisor gives up


@dataclass(frozen=True)
class Member:
    """Somebody with a kit for commands."""

    kit: Kit
    ends: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)  # by job, what failed ones have said

    @property
    def where(self) -> str:
        return f"{self.kit.host}:{self.kit.port}"

    @contextlib.contextmanager
    def session(self) -> Iterator[Commands]:
        with session.opened(self.kit.folder, self.kit.name, self.where) as commands:
            yield commands

    def kept(self, run: str) -> Path:
        """Where this kit keeps what was submitted under the name of a run."""
        return self.kit.state / _SUBMITTED / f"{run}.toml"


def owner(folder: Path) -> Member:
    """Who may submit, stop and resume. Raises `DeployError` for the kit of anybody else."""
    return _member(folder, (OWNER,))


def reader(folder: Path) -> Member:
    """Who may look: an owner or a viewer; and the server's own kit, for its run folders."""
    return _member(folder, (OWNER, VIEWER, SERVER))


def _member(folder: Path, roles: tuple[str, ...]) -> Member:
    kit = kits.open_kit(folder, roles)
    kits.check(kit)
    if kit.role != SERVER:
        make_folder(kit.state / _SUBMITTED, 0o700)
    return Member(kit)


# --- what is submitted ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A run as it is submitted. `text`: its configuration in TOML, without sources, paths and code."""

    run: str
    sites: tuple[str, ...]
    least: int
    text: str


def request(member: Member, path: Path) -> Request:
    """The run in the configuration at `path`, checked as far as the owner's machine can. Raises `AnyRankError`."""
    return request_of(member.kit.sites, configs.load(path))


def request_of(known: tuple[str, ...], config: Config) -> Request:
    """The run in `config`, over sites of a federation that has the sites `known`."""
    from anyrank import methods
    from anyrank.deployment.public import check, check_labels, kept

    check(config, methods.make(config.method.name, config.method.options))
    check_labels(config)  # each site would refuse the run later
    names = tuple(site.name for site in config.sites)
    check_sites(names)
    for name in names:
        if name not in known:
            raise DeployError(f"sites: {name!r} is no site of this federation; {nearest(name, known)}")
    least = min(config.rounds.least or 1, len(names))
    return Request(config.run.name, names, max(1, least), tomli_w.dumps(to_table(kept(config))))


# --- a run's life ---------------------------------------------------------------------------------------------------------


def submit(member: Member, asked: Request) -> str:
    """Submit a run under a new name: the job's id. Raises `DeployError` where the run is under way or was there before."""
    kept = member.kept(asked.run)
    with member.session() as commands:
        jobs = [job for job in commands.jobs() if job.run == asked.run]
        if jobs and jobs[-1].state in ("waiting", "running"):
            raise DeployError(f"run {asked.run}: is under way already; {_watch(member)}")
        if jobs:
            told = f"anyrank deploy resume {asked.run} --kit {member.kit.folder}"
            raise DeployError(
                f"run {asked.run}: was submitted before ({jobs[-1].state}); to go on: {told}; else set another run.name"
            )
        write_whole_text(kept, asked.text)
        return _send(member, commands, asked)


def _watch(member: Member) -> str:
    return f"follow it with: anyrank deploy status --watch --kit {member.kit.folder}"


def _send(member: Member, commands: Commands, asked: Request) -> str:
    from anyrank.engines.nvflare import job

    place = Path(tempfile.mkdtemp(dir=member.kit.state))
    try:
        arguments = {"config": job.enclosed(asked.text)}
        return commands.submit(job.write(place / asked.run, asked.run, asked.sites, asked.least, ROUNDS, arguments))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _jobs_of(commands: Commands, run: str) -> list[Job]:
    jobs = commands.jobs()
    found = [job for job in jobs if job.run == run]
    if not found:
        runs = sorted({job.run for job in jobs})
        raise DeployError(f"run {run}: was not submitted here; {nearest(run, runs) if runs else 'there are no runs yet'}")
    return found


def stop(member: Member, run: str, wait_s: float = _STOP_S) -> list[str]:
    """Stop a run's jobs, and wait until they have ended: the ids of those that were under way, or that only seemed to be.

    Raises `DeployError` if none was, and `RunFailed` if one has not ended after `wait_s` seconds.
    """
    with member.session() as commands:
        jobs = [job for job in _jobs_of(commands, run) if not job.over or job.lost]
        if not jobs:
            raise DeployError(f"run {run}: is not under way; nothing to stop")
        for job in jobs:
            _end_lost(commands, job) if job.lost else commands.abort(job.id)
        until = time.monotonic() + wait_s
        while not all(job.over for job in _jobs_of(commands, run)):
            if time.monotonic() > until:
                raise RunFailed(f"run {run}: its job has not ended after {wait_s:g} s; {_watch(member)}")
            time.sleep(_STOP_LOOK_S)
    return [job.id for job in jobs]


def _end_lost(commands: Commands, job: Job) -> None:
    """End a job that only seems to run: what is left of it at sites. NVFlare may say that it does not run, which is right."""
    if job.lost:
        with contextlib.suppress(DeployError):
            commands.abort(job.id)


def resume(member: Member, run: str) -> str:
    """Submit a run again, which then goes on from its last whole round on the server: the new job's id."""
    with member.session() as commands:
        return _resume(member, commands, run)


def _resume(member: Member, commands: Commands, run: str) -> str:
    kept = member.kept(run)
    if not kept.is_file():
        raise DeployError(f"run {run}: this kit has not submitted it; resume it with the kit that did")
    jobs = _jobs_of(commands, run)
    if not jobs[-1].over:
        raise _NothingToResume(f"run {run}: is under way; {_watch(member)}")
    if jobs[-1].state == "done" and _end(member, commands, jobs[-1]).get("state") == "done":
        raise _NothingToResume(f"run {run}: is done; nothing to resume")
    for job in jobs:
        _end_lost(commands, job)
    return _send(member, commands, request_of(member.kit.sites, configs.load(kept)))


class _NothingToResume(DeployError):
    """A run that is under way, or done."""


def _end(member: Member, commands: Commands, job: Job) -> dict[str, Any]:
    """What a job says of its end: `state` done, more (its share of rounds is done), stopped or failed; empty if it does not."""
    with contextlib.suppress(DeployError):
        return commands.ended(job.id, member.kit.state)
    return {}


def keep_going(member: Member, run: str, tell: Callable[[str], None], look_s: float = LOOK_S) -> dict[str, Any]:
    """Follow a run to its end, and submit it again where its server was lost, or where its job has had its share of rounds.

    Raises `RunFailed` where a job says that it failed, where jobs are lost time after time without a round between them, and
    where the server stays away.
    """
    followed, away_since = _Followed(member, run, tell), 0.0
    while True:
        try:
            with member.session() as commands:
                away_since = 0.0
                while (end := followed.look(commands)) is None:
                    time.sleep(look_s)
                return end
        except Unreached as error:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > _AWAY_S:
                again = f"anyrank deploy resume {run} --keep-going --kit {member.kit.folder}"
                raise RunFailed(f"run {run}: {error}; when it is back: {again}") from None
            tell(f"{run}: the server cannot be reached; looking again")
            time.sleep(look_s)


@dataclass
class _Followed:
    """A run that is followed. `reached`: the furthest round that was seen; `lost`: jobs that were lost since; `said`: the line
    that was given last; `lost_since`: when its newest job was first seen lost, 0 where it is not."""

    member: Member
    run: str
    tell: Callable[[str], None]
    reached: int = 0
    lost: int = 0
    said: str = ""
    lost_since: float = 0.0

    def look(self, commands: Commands) -> dict[str, Any] | None:
        """How the run has ended; `None` while it has not. Submits it again where that is needed."""
        job = _jobs_of(commands, self.run)[-1]
        if not job.over:
            self._note(commands, job)
        if not job.over or self._may_be_ending(job):
            return None
        end = _end(self.member, commands, job) if job.state in ("done", "failed") else {}
        said = end.get("state")
        self._say(self._rounds(end))
        if job.state == "stopped" or (job.state == "done" and said != "more"):
            return {"run": self.run, "state": job.state, "jobs": job.attempt}
        if job.state == "failed" and said == "failed":  # by its own word, which the next job would repeat
            reason = end["reason"] or end.get("code") or "the server's log says why"
            raise RunFailed(f"run {self.run}: failed: {reason}")
        if said != "more":
            self._count(job)
        with contextlib.suppress(_NothingToResume):  # it has ended since
            _resume(self.member, commands, self.run)
        return None

    def _may_be_ending(self, job: Job) -> bool:
        """Whether a job that seems lost has not seemed so for long."""
        now = time.monotonic()
        self.lost_since = (self.lost_since or now) if job.lost else 0.0
        if not job.lost or now - self.lost_since >= _LOST_S:
            self.lost_since = 0.0
            return False
        return True

    def _note(self, commands: Commands, job: Job) -> None:
        """Say how far the run is, or what it waits for, where that has changed."""
        words = ""
        with contextlib.suppress(DeployError):
            if job.state == "running":
                words = self._rounds(commands.progress(job.id)) or "starting"
            else:
                words = _waits(_queued(commands, job, _seen(commands.standing())) | {"waiting_s": None})
        self._say(words)

    def _rounds(self, told: Mapping[str, Any]) -> str:
        """The rounds in what a job says of itself; empty where it has had none."""
        reached, rounds = told.get("round"), told.get("rounds")
        if type(reached) is not int or type(rounds) is not int or reached < 1:
            return ""
        if reached > self.reached:
            self.reached, self.lost = reached, 0
        return f"round {reached} of {rounds}"

    def _say(self, words: str) -> None:
        new, self.said = words and words != self.said, words or self.said
        self.tell(f"{self.run}: {words}" if new else "")

    def _count(self, job: Job) -> None:
        self.lost += 1
        if self.lost > _MOST_LOST:
            raise RunFailed(f"run {self.run}: {self.lost} jobs were {job.state} in a row; see the server's log, then resume it")
        self.tell(f"{self.run}: its job was {job.state}; submitting it again")


def remove(member: Member, site: str, undo: bool = False) -> None:
    """Let the server refuse a site, or accept it again."""
    with member.session() as commands:
        (commands.let_in if undo else commands.keep_out)(site)


# --- looking --------------------------------------------------------------------------------------------------------------


def status(member: Member) -> dict[str, Any]:
    """What the server says: itself, the sites with the seconds since they were heard, the newest job of each run.

    Where the server cannot be asked, and its kit is here, what its run folders say: see `looking.status`.
    """
    at_hand = looking.server_kit(member.kit)
    if member.kit.role == SERVER:
        return looking.status(member.kit)
    try:
        return _asked(member)
    except Unreached:
        found = looking.status(at_hand) if at_hand else {}
        if not found.get("runs"):
            raise
        return found


def _asked(member: Member) -> dict[str, Any]:
    with member.session() as commands:
        seen = _seen(commands.standing())
        newest = {job.run: job for job in commands.jobs()}
        runs = [_row(commands, job, seen) for job in newest.values()]
        over = [row for row in runs if row["state"] in ("failed", "done")]
        for row in over[-_MOST_REASONS:]:
            row |= _why(member, commands, newest[row["run"]])
    sites = [{"name": name, "seen_s": round(seen[name], 1) if name in seen else None} for name in member.kit.sites]
    others = [{"name": name, "seen_s": round(age, 1)} for name, age in sorted(seen.items()) if name not in member.kit.sites]
    return {"federation": member.kit.federation, "server": member.where, "sites": [*sites, *others], "runs": runs}


def _seen(standing: session.Standing) -> dict[str, float]:
    """`{site: seconds since the server has heard it}`."""
    now = time.time()
    return {name: max(0.0, now - at) for name, at in standing.seen.items()}


def _why(member: Member, commands: Commands, job: Job) -> dict[str, str]:
    """`reason`: why a job has failed, where it has said so. A run of which it had only its share of rounds is no more than
    paused."""
    if job.id not in member.ends:
        member.ends[job.id] = _end(member, commands, job)
    end = member.ends[job.id]
    if end.get("state") == "more" and job.state == "done":
        return {"state": "paused", **{key: end[key] for key in ("round", "rounds") if end.get(key)}}
    return {"reason": str(end["reason"] or end.get("code") or "")} if end.get("state") == "failed" else {}


def _queued(commands: Commands, job: Job, seen: Mapping[str, float]) -> dict[str, Any]:
    """What a waiting job waits for, and for how long."""
    busy, sites = commands.queued(job.id)
    away = sorted(site for site in sites if seen.get(site, math.inf) >= _SEEN_S)
    return {"busy": busy, "waiting": away, "waiting_s": job.waited(time.time())}


def _row(commands: Commands, job: Job, seen: Mapping[str, float]) -> dict[str, Any]:
    """What is known of a run by its newest job. `seen`: `{site: seconds since it was heard}`."""
    row = dataclasses.asdict(job) | {"state": job.state}
    if job.state == "waiting":
        row |= _queued(commands, job, seen)
    if job.state == "running":
        try:
            told = commands.progress(job.id)
            row |= {key: told[key] for key in ("round", "rounds", "waiting") if key in told}
        except DeployError:
            row["silent"] = True
    return row


def in_words(table: Mapping[str, Any]) -> list[str]:
    """The lines of a status: a verdict for each run, and who is there."""
    if "from" in table:
        return looking.in_words(table)
    here = [each["name"] for each in table["sites"] if each["seen_s"] is not None and each["seen_s"] < _SEEN_S]
    away = [each["name"] for each in table["sites"] if each["name"] not in here]
    lines = [f"{table['federation']} at {table['server']}: {len(here)} of {len(table['sites'])} sites connected"]
    lines += [f"  away: {', '.join(away)}"] if away else []
    return lines + [f"  {_verdict(row)}" for row in table["runs"]] + ([] if table["runs"] else ["  no runs yet"])


def _verdict(row: Mapping[str, Any]) -> str:
    if row["state"] == "waiting":
        return f"{row['run']}: {_waits(row)}"
    said = f"{row['run']}: {row['state']}"
    if row["state"] == "lost":
        return f"{said}: its server was restarted, and nothing runs it; resume it"
    if row["state"] == "paused":
        at = f" after round {row['round']} of {row['rounds']}" if row.get("rounds") else ""
        return f"{said}{at}: its job had its share of rounds; resume it"
    if row.get("reason"):
        said += f": {row['reason']}"
    if row.get("rounds"):
        said += f", round {row['round']} of {row['rounds']}"
    elif "rounds" in row:
        said = f"{row['run']}: starting"
    if row.get("silent"):
        said += ", its job does not answer (it starts, or hangs)"
    if row.get("waiting"):
        said += f", waiting for {', '.join(row['waiting'])}"
    return said


def _waits(row: Mapping[str, Any]) -> str:
    """What a waiting run waits for. Busy sites are connected, so they are not those that are away."""
    said = "waiting"
    if row.get("waiting"):
        said += f" for {', '.join(row['waiting'])}"
        said += f" ({looking.age(row['waiting_s'])})" if row.get("waiting_s") is not None else ""
    busy = ", ".join(f"{site} ({run})" for site, run in sorted(row["busy"].items()))
    return said + (f"{' and' if row.get('waiting') else ''} for busy sites: {busy}" if busy else "")


def following(table: Mapping[str, Any], kit: Path) -> str:
    """What to type next, after a status."""
    if "from" in table:
        return looking.following(table, looking.server_kit(kits.open_kit(kit)))
    rows = {state: row for row in reversed(table["runs"]) for state in [row["state"]]}
    if "lost" not in rows and under_way(table):
        return f"anyrank deploy status --watch --kit {kit}"
    again = rows.get("lost") or rows.get("failed") or rows.get("stopped") or rows.get("paused")
    if again:
        cause = "correct the cause, then: " if again.get("reason") else ""
        return f"{cause}anyrank deploy resume {again['run']} --kit {kit}"
    return f"anyrank deploy submit run.toml --kit {kit}"


def under_way(table: Mapping[str, Any]) -> bool:
    """Whether a status may change by itself: a run waits or runs. By run folders: the server runs, and not all are done."""
    states = [row["state"] for row in table["runs"]]
    if "from" in table:
        return table["running"] and not (states and set(states) == {"done"})
    return "waiting" in states or "running" in states

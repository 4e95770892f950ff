"""Run a federation over sites from this process, the server, which has neither examples nor base weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyrank import devices, methods
from anyrank.config.sections import Config
from anyrank.deployment.public import check, kept, public
from anyrank.engines.seat import Make, process
from anyrank.engines.sites import Sites
from anyrank.errors import ConfigError
from anyrank.federation import assembly, loop
from anyrank.federation.checks import check_ranks
from anyrank.messages.records import Scaling
from anyrank.progress import Progress
from anyrank.runs import removal, waiting
from anyrank.runs.folder import RunDir

MOST_BYTES = 1 << 34  # of a frame from a site


def federate(
    config: Config,
    sites: Mapping[str, Sequence[str] | Make],
    out: Path,
    resume: bool = False,
    on_round: Callable[[Mapping[str, Any]], None] | None = None,
    progress: Progress | None = None,
    wait_s: float = 600.0,
    most_bytes: int = MOST_BYTES,
) -> dict[str, Any]:
    """Run a configuration over sites in the folder `out`; returns the summary.

    `sites`: for each `[[sites]]` table, by name, the command that runs its worker on this machine, or a function that makes
    what carries frames to it and back (see `anyrank.engines.seat.Make`). The run begins when all sites are there, within
    `wait_s` seconds; `progress(there, all)` counts them. `most_bytes`: the largest frame that a site may send.

    The folder is an ordinary run folder. Its config.toml has no sources and no folder of a base model, which only the sites
    know. In place of digests of data files and base model, identity.json has those of the base model and of the start adapter
    on which the sites agree; a run goes on with the same. Raises `AnyRankError`, in one line.
    """
    method = methods.make(config.method.name, config.method.options)
    check(config, method)
    check_ranks(config, method)
    makes = _makes(config, sites, most_bytes)
    known = kept(config)
    RunDir.check(out, known, resume)
    scaling = Scaling(config.lora.alpha, config.lora.scaling)
    with removal.unless_begun(out), devices.threads(config.run.threads):
        start = (max(config.clients.ranks), scaling, config.run.seed)
        engine = Sites(public(config), start, makes, config.run.name, most=config.run.workers)
        try:
            with waiting.shown(out, waiting.BEFORE_ROUNDS, ()) as wait:
                roster = engine.open(wait_s, lambda away: _missing(away, len(makes), wait, progress), _there(out))
            built = replace(assembly.assemble(known, method, roster), engine=engine, hands_over=True)
            with RunDir.open(out, known, resume, engine.agreed) as store:
                engine.keep_in(out)
                return loop.run(built, store, on_round)
        finally:
            engine.close()


def _there(path: Path) -> Path:
    """The first folder at or above `path` that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())


def _missing(away: Sequence[str], sites: int, wait: waiting.Wait, progress: Progress | None) -> None:
    wait.only(away)
    if progress:
        progress(sites - len(away), sites)


def _makes(config: Config, sites: Mapping[str, Sequence[str] | Make], most_bytes: int) -> dict[str, Make]:
    named = {site.name for site in config.sites}
    if odd := sorted(named ^ sites.keys()):
        has, lacks = ("[[sites]]", "the given sites") if odd[0] in named else ("the given sites", "[[sites]]")
        raise ConfigError(f"sites: {odd[0]!r} is among {has} and not among {lacks}; name the same ones in both")
    return {name: given if callable(given) else process(given, most_bytes) for name, given in sites.items()}

"""The rounds of a job on NVFlare: a federation over the sites that take part in it, in the run's own folder on the server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from anyrank.config.tables import from_table, parse_toml
from anyrank.engines.nvflare.controller import Job
from anyrank.engines.nvflare.job import opened
from anyrank.errors import ConfigError, in_a_line
from anyrank.runs import names

_RUN = "run"  # in the folder of the run's name


class Rounds:
    """A component of a job. `config`: the configuration, as TOML that `enclosed` has made an argument. `segment`: rounds of one
    job; the next one goes on from the checkpoint, with the sites that are there then."""

    def __init__(self, config: str, segment: int = 20) -> None:
        try:
            self._config = from_table(parse_toml(opened(config)))
        except ValueError as error:
            raise ConfigError(f"job: its configuration is not readable as TOML: {in_a_line(error)}") from None
        if type(segment) is not int or segment < 1:
            raise ConfigError(f"job, segment: expected a whole number of at least 1, got {segment!r}")
        self._segment = segment

    def serve(self, job: Job) -> bool:
        """Run rounds: from the checkpoint, where there is one. False: there are more than this job's share."""
        from anyrank.deployment.running import federate

        config, out = self._config, job.folder / _RUN
        sites = {site.name: partial(_worker, job, site.name) for site in config.sites}
        done: list[int] = []

        def after(row: Mapping[str, Any]) -> None:
            done.append(row["round"])
            job.told(row["round"], config.run.rounds)
            if len(done) >= self._segment and row["round"] < config.run.rounds:
                raise _Enough

        try:
            federate(config, sites, out, resume=(out / names.CONFIG).exists(), on_round=after)
        except _Enough:
            return False
        return True


class _Enough(Exception):
    """This job has had its share of the rounds."""


def _worker(job: Job, site: str, opening: Any, opened: Any, receive: Any) -> Any:
    return job.worker(site, opening, opened, job.reply, receive)

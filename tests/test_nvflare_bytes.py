"""One federation in one process and over NVFlare, with site workers as real sites have them: the same bytes of the adapter."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("nvflare")
pytest.importorskip("transformers")

import flare
import site_world
from anyrank import simulation
from anyrank.engines.nvflare import job as jobs
from anyrank.engines.nvflare import kits

pytestmark = pytest.mark.skipif(os.environ.get("ANYRANK_SITES") != "all", reason="ANYRANK_SITES=all runs it (`make sites`)")
SITES = sorted(site_world.RANKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_world.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def system(folder: Path) -> Iterator[flare.System]:
    with flare.running(folder / "flare", SITES) as made:
        for name in SITES:
            own = {
                **{"name": name, "data": {"source": str(folder / f"{name}.csv")}, "model": {"folder": str(folder / "model")}},
                **{"privacy": {"level": "none"}, "accept": {"scores": True}, "store": {"folder": "../store"}},
            }
            (made.kits / name / "local" / kits.SITE).write_text(tomli_w.dumps(own))
        yield made


def public(method: str) -> dict[str, Any]:
    table = site_world.table(method, eval={"where": "sites"})
    return table | {"sites": [one | {"source": "at the site"} for one in table["sites"]]}


def digests(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("adapter*/*.safetensors"))
    }


class Submitted:
    """A run over the system, job after job."""

    def __init__(self, system: flare.System, session: Any, folder: Path, name: str, method: str, segment: int) -> None:
        self.system, self.session = system, session
        arguments = {"config": jobs.enclosed(tomli_w.dumps(public(method))), "segment": segment}
        self.job = jobs.write(folder / f"job-{name}", name, SITES, 3, "anyrank.deployment.nvflare.Rounds", arguments)
        self.run = system.kits / "localhost" / "state" / name / "run"

    def submit(self) -> str:
        return self.session.submit_job(str(self.job))

    def finish(self, job: str) -> str:
        """How our side says that the job ended; empty if it could not say so."""
        flare.wait_for(lambda: self.session.get_job_meta(job)["status"].startswith("FINISHED"), 300, 0.5)
        found = list(Path(self.session.download_job_result(job)).rglob("anyrank.json"))
        return json.loads(found[0].read_text())["state"] if found else ""


def in_one_process(folder: Path, method: str, out: Path) -> dict[str, str]:
    simulation.execute(site_world.in_one_process(folder, public(method)), out)
    return digests(out)


def test_two_jobs_give_the_bytes_of_one_process(system: flare.System, folder: Path, tmp_path: Path) -> None:
    with system.session() as session:
        flare.wait_for_sites(session, len(SITES))
        run = Submitted(system, session, tmp_path, "segments", "rbla", segment=2)
        assert run.finish(run.submit()) == "more"
        assert run.finish(run.submit()) == "done"
    assert digests(run.run) == in_one_process(folder, "rbla", tmp_path / "one")


def test_a_server_job_killed_in_round_two_gives_the_same_bytes_when_it_is_submitted_again(
    system: flare.System, folder: Path, tmp_path: Path
) -> None:
    with system.session() as session:
        flare.wait_for_sites(session, len(SITES))
        run = Submitted(system, session, tmp_path, "killed", "raflora", segment=10)
        job = run.submit()
        log = run.run / "metrics.jsonl"
        flare.wait_for(lambda: log.exists() and log.read_text().count("\n") >= 1, 200)
        system.job_process("localhost").kill()
        assert run.finish(job) != "done"
        assert run.finish(run.submit()) == "done"
    rounds = [json.loads(line)["round"] for line in log.read_text().splitlines()]
    assert rounds == [1, 2, 3]
    assert digests(run.run) == in_one_process(folder, "raflora", tmp_path / "one")

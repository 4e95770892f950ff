"""One federation in one process, in worker processes, and over NVFlare with mutual TLS on loopback: the same bytes.

Server and sites are real processes, and site workers are those of real sites. One system serves all runs of this file, one job
after another. The longer matrix (several jobs of one run, kills) needs ANYRANK_SITES=all (`make sites`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
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
from anyrank.config.tables import from_table, to_table
from anyrank.engines.nvflare import job as jobs
from anyrank.remote import kits
from anyrank.worker.site import spent
from anyrank.worker.sitefile import load

dp = pytest.importorskip("dp_accounting")
from dp_accounting.pld import PLDAccountant  # noqa: E402

LONG = pytest.mark.skipif(os.environ.get("ANYRANK_SITES") != "all", reason="ANYRANK_SITES=all runs it (`make sites`)")
RANKS = {"county": 8, "lakeside": 4, "st-mary": 16}
SITES = sorted(RANKS)
METHODS = ("raflora", "rbla", "ffa_lora", "stayput", "flexlora", "fedsa")
DELTA = 1e-5
PRIVATE = {"level": "example", "noise_multiplier": 1.2, "delta": DELTA, "clip": 0.5, "secure": True}
GRANT, PRIVATE_ROUNDS = 50.0, 2
_WAIT_S = 300.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_world.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def system(folder: Path) -> Iterator[flare.System]:
    with flare.running(folder / "flare", SITES) as made:
        for name in SITES:
            settle(made, folder, name, {"level": "none"}, {"scores": True})
        yield made


def settle(system: flare.System, folder: Path, name: str, privacy: dict[str, Any], accept: dict[str, Any]) -> Path:
    """Write a site's own file, as its operator would: it is read at the start of each job."""
    own = {
        **{"name": name, "data": {"source": str(folder / f"{name}.csv")}, "model": {"folder": str(folder / "model")}},
        **{"privacy": privacy, "accept": accept, "store": {"folder": "../store"}},
    }
    path = system.kits / name / "local" / kits.SITE
    path.write_text(tomli_w.dumps(own))
    return path


def public(method: str, **sections: Any) -> dict[str, Any]:
    table = site_world.table(method, eval={"where": "sites"}, **sections)
    return table | {"sites": [{"name": name, "rank": rank, "source": "at the site"} for name, rank in RANKS.items()]}


def digest(run: Path) -> str:
    """SHA-256 of all files of `adapter/`, and of those for single ranks, with their names."""
    total = hashlib.sha256()
    for path in sorted(run.glob("adapter*/*")):
        total.update(f"{path.relative_to(run)} {hashlib.sha256(comparable(path)).hexdigest()}\n".encode())
    return total.hexdigest()


def comparable(path: Path) -> bytes:
    """A file's bytes, without what names the folder of the base model, which only one of the places knows."""
    if path.name == "adapter_config.json":
        return json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}, sort_keys=True).encode()
    return b"" if path.name == "README.md" else path.read_bytes()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Submitted:
    """A run over the system, job after job."""

    def __init__(
        self, system: flare.System, session: Any, folder: Path, name: str, table: dict[str, Any], segment: int = 20
    ) -> None:
        self.system, self.session = system, session
        arguments = {"config": jobs.enclosed(tomli_w.dumps(table)), "segment": segment}
        self.job = jobs.write(folder / f"job-{name}", name, SITES, 3, "anyrank.deployment.nvflare.Rounds", arguments)
        self.run = system.kits / "localhost" / "state" / name / "run"

    def submit(self) -> str:
        return self.session.submit_job(str(self.job))

    def done(self, job: str) -> Path:
        """The folder of the run once it is whole. Its job ends some seconds later."""
        flare.wait_for(lambda: (self.run / "summary.json").exists() or self.over(job), _WAIT_S, 0.3)
        assert (self.run / "summary.json").exists(), self.finish(job)
        return self.run

    def over(self, job: str) -> bool:
        return self.session.get_job_meta(job)["status"].startswith("FINISHED")

    def finish(self, job: str) -> str:
        """How our side says that the job ended; empty if it could not say so."""
        flare.wait_for(lambda: self.over(job), _WAIT_S, 0.5)
        found = list(Path(self.session.download_job_result(job)).rglob("anyrank.json"))
        return json.loads(found[0].read_text())["state"] if found else ""


@pytest.fixture(scope="module")
def session(system: flare.System) -> Iterator[Any]:
    with system.session() as opened:
        flare.wait_for_sites(opened, len(SITES))
        yield opened


def workers_gone(system: flare.System) -> bool:
    """Whether no worker of a site is left: one at a time may use a site's store."""
    return not any("anyrank.worker" in " ".join(flare.words(each)) for each in system.alive())


def over_sites(system: flare.System, session: Any, folder: Path, name: str, table: dict[str, Any]) -> tuple[Submitted, str]:
    """A run that has been submitted, and its job."""
    run = Submitted(system, session, folder, name, table)
    flare.wait_for(lambda: workers_gone(system), 60)
    return run, run.submit()


def in_one_process(folder: Path, table: dict[str, Any], out: Path, **engine: Any) -> Path:
    config = to_table(site_world.in_one_process(folder, table))
    config["run"] |= engine
    simulation.execute(from_table(config), out)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_one_configuration_gives_the_same_bytes_wherever_its_clients_train(
    system: flare.System, session: Any, folder: Path, tmp_path: Path, method: str
) -> None:
    run, job = over_sites(system, session, tmp_path, method.replace("_", "-"), public(method))
    alone = in_one_process(folder, public(method), tmp_path / "process")
    apart = in_one_process(folder, public(method), tmp_path / "workers", engine="workers", workers=1)
    whole = run.done(job)
    assert digest(whole) == digest(alone) == digest(apart)
    rows = [[row["accuracy"], row["loss"], row["clients"]] for row in lines(whole / "metrics.jsonl")]
    assert rows == [[row["accuracy"], row["loss"], row["clients"]] for row in lines(alone / "metrics.jsonl")]
    assert len(list(whole.glob("adapter*/*.safetensors"))) == 1 + len(RANKS)


def test_a_private_run_charges_at_its_sites_what_it_charges_in_one_process(
    system: flare.System, session: Any, folder: Path, tmp_path: Path
) -> None:
    """Noise is drawn at each site from the system's source, so that numbers differ. Each charge and the epsilon are equal, and
    the epsilon is that of dp-accounting."""
    flare.wait_for(lambda: workers_gone(system), 60)
    granted = {"level": "example", "epsilon": GRANT, "delta": DELTA}
    files = {name: settle(system, folder, name, granted, {}) for name in SITES}
    table = public("rbla", privacy=PRIVATE, run={"rounds": PRIVATE_ROUNDS})
    run, job = over_sites(system, session, tmp_path, "private", table)
    alone = in_one_process(folder, table, tmp_path / "process")
    whole = run.done(job)
    flare.wait_for(lambda: workers_gone(system), 60)
    charged = {name: lines(system.kits / name / "store" / "ledger.jsonl") for name in SITES}
    at_sites = charges([row | {"client": name} for name in SITES for row in charged[name]])
    assert at_sites == charges(lines(whole / "privacy.jsonl")) == charges(lines(alone / "privacy.jsonl"))
    assert at_sites.total() == PRIVATE_ROUNDS * len(SITES)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (whole, alone)]
    assert summaries[0]["epsilon"] == summaries[1]["epsilon"]
    for name, path in files.items():
        told = spent(load(path))
        assert told["charges"] == PRIVATE_ROUNDS
        expected = by_dp_accounting(charged[name])
        assert told["spent"] == pytest.approx(expected, rel=0.01)
        for summary in summaries:
            assert summary["privacy"]["epsilon_by_client"][name] == pytest.approx(expected, rel=0.01)
    assert digest(whole) != digest(alone)  # noise of the system's source


def charges(rows: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(row[key] for key in ("client", "round", "sampling_rate", "noise_multiplier", "steps")) for row in rows)


def by_dp_accounting(rows: list[dict[str, Any]]) -> float:
    accountant = PLDAccountant()
    for row in rows:
        step = dp.PoissonSampledDpEvent(row["sampling_rate"], dp.GaussianDpEvent(row["noise_multiplier"]))
        accountant.compose(step, row["steps"])
    return accountant.get_epsilon(DELTA)


# --- with ANYRANK_SITES=all -----------------------------------------------------------------------------------------------


@LONG
def test_two_jobs_give_the_bytes_of_one_process(system: flare.System, session: Any, folder: Path, tmp_path: Path) -> None:
    open_again(system, folder)
    run = Submitted(system, session, tmp_path, "segments", public("rbla"), segment=2)
    assert run.finish(run.submit()) == "more"
    assert run.finish(run.submit()) == "done"
    assert digest(run.run) == digest(in_one_process(folder, public("rbla"), tmp_path / "one"))


@LONG
def test_a_server_job_killed_in_round_two_gives_the_same_bytes_when_it_is_submitted_again(
    system: flare.System, session: Any, folder: Path, tmp_path: Path
) -> None:
    open_again(system, folder)
    run = Submitted(system, session, tmp_path, "killed", public("raflora"), segment=10)
    job = run.submit()
    log = run.run / "metrics.jsonl"
    flare.wait_for(lambda: log.exists() and log.read_text().count("\n") >= 1, 200)
    system.job_process("localhost").kill()
    assert run.finish(job) != "done"
    assert run.finish(run.submit()) == "done"
    assert [row["round"] for row in lines(log)] == [1, 2, 3]
    assert digest(run.run) == digest(in_one_process(folder, public("raflora"), tmp_path / "one"))


def open_again(system: flare.System, folder: Path) -> None:
    """Sites without privacy, as at the start."""
    flare.wait_for(lambda: workers_gone(system), 60)
    for name in SITES:
        settle(system, folder, name, {"level": "none"}, {"scores": True})

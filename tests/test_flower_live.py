"""The Flower engine over Flower: one server and two sites as real processes, in an environment of Flower's own, through a proxy
that lets the fleet's paths through alone. The same bytes as in one process, also when processes are killed."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("transformers")

import flower_world
import site_world
from anyrank import simulation

pytestmark = [
    pytest.mark.skipif(os.environ.get("ANYRANK_SITES") != "all", reason="ANYRANK_SITES=all runs it (`make sites`)"),
    pytest.mark.skipif(not flower_world.PYTHON.exists(), reason=f"Flower's environment is absent: no {flower_world.PYTHON}"),
]
SITES = ("county", "lakeside")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_world.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def system(folder: Path) -> Iterator[flower_world.System]:
    made = flower_world.System(folder / "f", SITES)

    def own(name: str) -> dict[str, Any]:
        return {
            **{"name": name, "data": {"source": str(folder / f"{name}.csv")}, "model": {"folder": str(folder / "model")}},
            **{"privacy": {"level": "none"}, "accept": {"scores": True}, "store": {"folder": "store"}},
        }

    with flower_world.proxy(made.port) as port:
        made.site_files(port, own)
        try:
            made.start()
            yield made
        finally:
            made.stop()


def config(folder: Path, name: str, method: str, rounds: int = 3) -> Path:
    table = site_world.table(method, eval={"where": "sites"})
    table["run"] |= {"name": name, "rounds": rounds}
    table["sites"] = [one | {"source": "at the site"} for one in table["sites"] if one["name"] in SITES]
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def in_one_process(folder: Path, path: Path, out: Path) -> dict[str, str]:
    import tomllib

    simulation.execute(site_world.in_one_process(folder, tomllib.loads(path.read_text())), out)
    return digests(out)


def digests(run: Path) -> dict[str, str]:
    found = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("adapter*/*.safetensors"))
    }
    assert len(found) >= 2
    return found


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, error = process.communicate(timeout=500)
    return process.returncode, out + error


def run_of(system: flower_world.System, name: str) -> Path:
    return system.server / "runs" / name / "run"


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    path = run / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_frames_are_exact_through_flowers_own_messages() -> None:
    words = [str(flower_world.PYTHON), str(Path(__file__).with_name("flower_mail.py"))]
    found = subprocess.run(words, env=flower_world.ENV, capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(found.stdout) == {"loaded": [], "same": [True, True], "taken": []}


@pytest.mark.parametrize("method", ["rbla", "raflora", "fedsa"])
def test_two_nodes_give_the_bytes_of_one_process(
    system: flower_world.System, folder: Path, tmp_path: Path, method: str
) -> None:
    path = config(folder, method, method)
    status, said = finished(system.submit(path))
    assert status == 0, said
    assert digests(run_of(system, method)) == in_one_process(folder, path, tmp_path / "one")


def test_the_proxy_lets_no_command_through(system: flower_world.System) -> None:
    """The Control API has no accounts: who reaches it can run code. Only its absence from the proxy protects it."""
    flower_world.wait_for(lambda: answers(system.port))
    with flower_world.proxy(system.port) as port:
        for path, seen in {
            "/v1/control/list-runs": 404,
            "/v1/control/start-run": 404,
            "/v1/runtime/acquire-task": 404,
            "/v1/fleet/../control/list-runs": 404,
            "/v1/fleet/%2e%2e/control/list-runs": 404,
            "/v1/fleet//v1/control/list-runs": 404,
            "//v1/control/list-runs": 404,
            "/": 404,
            "/docs": 404,
        }.items():
            assert status_of(port, "POST", path) == seen, path
        assert status_of(port, "GET", "/health") == 200
        assert status_of(port, "POST", "/v1/fleet/pull-messages") != 404  # by Flower itself, which has not been asked properly
    assert status_of(system.port, "POST", "/v1/control/list-runs") != 404  # so that the refusal above is the proxy's


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return status_of(port, "GET", "/health") == 200
    return False


def status_of(port: int, verb: str, path: str) -> int:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        link.request(verb, path, b"" if verb == "POST" else None)
        return link.getresponse().status
    finally:
        link.close()


def test_a_superlink_that_is_killed_in_a_round_costs_no_bytes(
    system: flower_world.System, folder: Path, tmp_path: Path
) -> None:
    path = config(folder, "link", "raflora", rounds=4)
    submitted = system.submit(path)
    flower_world.wait_for(lambda: rows(run_of(system, "link")))
    (link,) = system.below("server", "flower-superlink")
    link.kill()
    status, said = finished(submitted)
    assert status == 0, said
    assert [row["round"] for row in rows(run_of(system, "link"))] == [1, 2, 3, 4]
    assert digests(run_of(system, "link")) == in_one_process(folder, path, tmp_path / "one")


def test_a_serverapp_that_is_killed_goes_on_when_it_is_submitted_again(
    system: flower_world.System, folder: Path, tmp_path: Path
) -> None:
    path = config(folder, "app", "rbla", rounds=4)
    submitted = system.submit(path)
    flower_world.wait_for(lambda: rows(run_of(system, "app")))
    (app,) = system.below("server", "flwr-serverapp")
    app.kill()
    status, said = finished(submitted)
    assert (status, "submit it again to go on" in said) == (1, True), said
    status, said = finished(system.submit(path))
    assert status == 0, said
    assert [row["round"] for row in rows(run_of(system, "app"))] == [1, 2, 3, 4]
    assert digests(run_of(system, "app")) == in_one_process(folder, path, tmp_path / "one")


def test_a_site_whose_worker_is_killed_loses_at_most_one_reply(system: flower_world.System, folder: Path) -> None:
    path = config(folder, "worker", "rbla", rounds=4)
    submitted = system.submit(path)
    flower_world.wait_for(lambda: rows(run_of(system, "worker")))
    for worker in system.below("lakeside", "anyrank.worker"):
        worker.kill()
    status, said = finished(submitted)
    assert status == 0, said
    lost = [row for row in rows(run_of(system, "worker"), "clients") if row["status"] != "ok"]
    assert len(lost) <= 1
    assert {row["client"] for row in lost} <= {"lakeside"}


def test_a_wrong_configuration_is_refused_before_it_is_submitted(system: flower_world.System, folder: Path) -> None:
    table = site_world.table("rbla", run={"name": "wrong"})
    path = folder / "wrong.toml"
    path.write_text(tomli_w.dumps(table | {"sites": [one | {"source": f"{one['name']}.csv"} for one in table["sites"]]}))
    status, said = finished(system.submit(path))
    assert (status, said.count("\n")) == (2, 1)
    assert "eval.where" in said
    assert not (system.server / "runs" / "wrong").exists()


def test_an_app_with_code_is_run_by_nobody(system: flower_world.System, tmp_path: Path) -> None:
    """Whoever reaches the Control API submits code: Flower starts it, and our process refuses to unpack it."""
    mark = tmp_path / "ran"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\napp = None\n")
    parts = {"serverapp": "mine:app", "clientapp": "mine:app"}
    table = {
        "project": {"name": "code", "version": "1.0.0"},
        "tool": {"flwr": {"app": {"publisher": "x", "components": parts}}},
    }
    (tmp_path / "code" / "pyproject.toml").write_text(tomli_w.dumps(table))
    state = system.server / "state"
    flower_world.wait_for(lambda: answers(system.port) and (state / "flwr").exists())
    connect = state / "flwr" / "config.toml"
    flower_world.wait_for(connect.exists)
    off = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(state / "flwr")}
    flwr = str(flower_world.PYTHON.parent / "flwr")
    words = [flwr, "run", str(tmp_path / "code"), "anyrank", "--format", "json"]
    found = subprocess.run(words, env=flower_world.ENV | off, capture_output=True, text=True, timeout=300)
    number = str(json.loads(found.stdout)["run-id"])

    def ended() -> bool:
        words = [flwr, "ls", "anyrank", "--run-id", number, "--format", "json"]
        listed = subprocess.run(words, env=flower_world.ENV | off, capture_output=True, text=True, timeout=300)
        return json.loads(listed.stdout)["runs"][0]["status"] == "finished:failed"

    flower_world.wait_for(ended, 300, 2)
    assert not mark.exists()


def test_no_process_outlives_its_party(tmp_path: Path) -> None:
    """Also not one that is killed, and has no time to end what it has started."""
    made = flower_world.System(tmp_path / "f", ())
    try:
        made.start("server")
        flower_world.wait_for(lambda: made.below("server", "flower-superlink") and made.below("server", "flower-superexec"))
        flower_world.wait_for(lambda: answers(made.port))
        made.processes["server"].kill()
        flower_world.wait_for(lambda: not made.alive(str(tmp_path / "f")), 60)
    finally:
        made.stop()

"""`anyrank deploy rehearse`: a whole federation on this machine, over loopback, with the processes of real machines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from anyrank import stopping
from anyrank.config.federation import FILE, FederationFile, Person, ServerPlace
from anyrank.config.sections import Config, SiteConfig
from anyrank.errors import DeployError, RunFailed, shortened
from anyrank.files import make_folder, write_whole_text
from anyrank.parties import commanding, kits, policies, provisioning
from anyrank.parties.commanding import Member
from anyrank.runs.names import CLIENTS, SUMMARY, read_lines, read_object
from anyrank.worker import sitefile

OWNER = Person("owner@rehearsal.example", "owner")
_HOST = "localhost"
_READY_S = 120.0  # for a server or a site to be connected
_LOOK_S = 1.0
_END_S = 30.0
TABLE = "rehearsal.json"  # in the rehearsal's folder: what happened
_NO_BUDGET = 1e6  # epsilon that no run reaches
_SLACK = 1.01
_SEPARATE = (
    *("text", "image", "label", "person", "header", "delimiter", "encoding", "format", "prompt", "completion", "template"),
    "chat",
)

Tell = Callable[[str], None]


def rehearse(config: Config, folder: Path, tell: Tell) -> dict[str, Any]:
    """Provision a federation of the sites of `config` in the new folder `folder`, start its server and sites, run it, and end
    all of them. Each site is given its own source, and the model, from `config`. Returns what happened.

    Raises `DeployError` for what cannot be rehearsed, and `RunFailed` where a process or the run fails; all processes have
    ended then, too.
    """
    if os.path.lexists(folder):
        raise DeployError(f"{folder}: exists already; name a new folder with --out, or remove this one")
    names = tuple(site.name for site in config.sites)
    from anyrank.deployment.public import check_labels

    asked = commanding.request_of(names, config)
    check_labels(config)  # before a federation is set up, whose sites would refuse
    began = time.monotonic()
    federation = FederationFile("rehearsal", names, ServerPlace(_HOST, (), free_port()), people=(OWNER,))
    _write(config, federation, folder)
    _, made = provisioning.provision(folder)
    tell(f"provisioned {len(made)} kits in {folder / provisioning.KITS}")
    with contextlib.ExitStack() as life:
        started = {}
        for name in (policies.SERVER, *names):
            started[name] = life.enter_context(_started(folder, name))
            if name == policies.SERVER:
                _connected(folder, started, tell)
        _connected(folder, started, tell)
        owner = commanding.owner(folder / provisioning.KITS / OWNER.name)
        commanding.submit(owner, asked)
        tell(f"submitted {asked.run}")
        end = _followed(owner, asked.run, started, tell)
    run = folder / provisioning.KITS / policies.SERVER / policies.STATE / policies.RUNS / asked.run / "run"
    seconds = round(time.monotonic() - began, 1)
    if end["state"] != "done":
        raise RunFailed(
            f"the rehearsal of {asked.run} ended: {end['state']}; the server's log: {_log(folder, policies.SERVER)}"
        )
    table = {**end, "seconds": seconds, "folder": str(run), "sites": _of_sites(run, names)}
    if config.privacy.level != "none":
        _add_ledgers(table, folder)
    write_whole_text(folder / TABLE, json.dumps(table, indent=2) + "\n")
    return table


def _of_sites(run: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What the run folder has of each site: rank, rounds that it took part in, and its own final scores."""
    rows, sites = read_lines(run / CLIENTS), read_object(run / SUMMARY).get("sites", {})
    found = []
    for name in names:
        own, scores = [row for row in rows if row.get("client") == name], sites.get(name, {})
        row = {"name": name, "rank": own[-1]["rank"] if own else None, "rounds": sum(row.get("status") == "ok" for row in own)}
        found.append(row | {key: scores.get(key) for key in ("train_examples", "accuracy", "loss")})
    return found


def _add_ledgers(table: dict[str, Any], folder: Path) -> None:
    """Add what the ledgers of the sites say, which are on this machine here: the epsilon that each has spent, and for how many
    releases. Beside it, the epsilon by the server's own record."""
    from anyrank.worker.site import spent

    private = read_object(Path(table["folder"]) / SUMMARY).get("privacy", {})
    by_server = private.get("epsilon_by_client", {})
    for row in table["sites"]:
        own = spent(sitefile.load(kits.open_kit(folder / provisioning.KITS / row["name"]).site_file))
        row |= {"epsilon": own["spent"], "delta": own["delta"], "releases": own["charges"], "ledger": own["ledger"]}
        row["epsilon_by_server"] = by_server.get(row["name"])
    table["epsilon"] = max(row["epsilon"] for row in table["sites"])


def free_port() -> int:
    """A port of loopback that nothing uses at this moment."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def _write(config: Config, federation: FederationFile, folder: Path) -> None:
    """`federation.toml`, and a file for each site, which `provision` puts into its kit."""
    make_folder(folder, 0o700)
    table = {"name": federation.name, "sites": list(federation.sites)}
    table |= {"server": {"host": federation.server.host, "port": federation.server.port}}
    table |= {"people": [{"name": each.name, "role": each.role} for each in federation.people]}
    write_whole_text(folder / FILE, tomli_w.dumps(table))
    make_folder(folder / provisioning.SITES, 0o700)
    for site in config.sites:
        kits.write_private(folder / provisioning.SITES / f"{site.name}.toml", tomli_w.dumps(site_table(config, site)).encode())


def site_table(config: Config, site: SiteConfig) -> dict[str, Any]:
    """The table of `site.toml` that gives a site what `config` gives it in one process, with the limits that a site has by
    itself."""
    data = {key: getattr(config.data, key) for key in _SEPARATE}
    data = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    data |= {"source": _absolute(site.source), "test_source": _absolute(site.test_source)}
    model = {"folder": _absolute(config.model.path)} if config.model.path else {"name": config.model.name}
    private = config.privacy.level != "none"
    granted = {"delta": config.privacy.delta, "epsilon": _granted(config)} if private else {}
    limits = {
        "rank": max(64, site.rank),
        "largest_rank": max(256, *config.clients.ranks),
        "rounds": max(1000, config.run.rounds),
    }
    return {
        "name": site.name,
        "data": data,
        "model": model,
        "device": {"kind": config.model.device, "threads": config.run.threads},
        "limits": limits,
        "privacy": {"level": config.privacy.level} | granted,
        "accept": {"scores": not private, "by_label": not private},
        "store": {"folder": f"../{policies.STATE}/store"},
    }


def _granted(config: Config) -> float:
    """The budget of a rehearsal's site: that of the run, or, where the run gives its noise instead, one that no run exceeds.

    A site bounds what is spent by its own accountants; those of two libraries differ by less than one percent.
    """
    asked = config.privacy
    return (asked.epsilon * (_SLACK if asked.accountant == "prv" else 1.0)) or _NO_BUDGET


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path and Path(path).exists() else path


# --- processes ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """`anyrank deploy start` for a kit, in a process of its own, which is ended with all that it started."""
    kit = folder / provisioning.KITS / name
    with open(_log(folder, name), "wb") as log, stopping.starting_a_child():
        command = [sys.executable, "-m", "anyrank", "deploy", "start", str(kit), "--ready-file", str(_ready(folder, name))]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    with stopping.child(process):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()
            process.wait()


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _ready(folder: Path, name: str) -> Path:
    return folder / provisioning.KITS / f".{name}.ready"


def _connected(folder: Path, started: Mapping[str, subprocess.Popen[bytes]], tell: Tell) -> None:
    """Wait until all that were started are connected. Raises `RunFailed` for one that ends, or takes too long."""
    until = time.monotonic() + _READY_S
    waiting = [name for name in started if not _ready(folder, name).exists()]
    while waiting:
        _alive(folder, started)
        if time.monotonic() > until:
            raise RunFailed(f"{', '.join(waiting)} did not connect within {_READY_S:.0f} s{_last(folder, waiting[0])}")
        time.sleep(0.2)
        for name in [name for name in waiting if _ready(folder, name).exists()]:
            waiting.remove(name)
            tell(f"{name}: {'listening' if name == policies.SERVER else 'connected'}")


def _alive(folder: Path, started: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for name, process in started.items():
        if process.poll() is not None:
            raise RunFailed(f"{name} ended with status {process.returncode}{_last(folder, name)}")


def _last(folder: Path, name: str) -> str:
    """The last line that a process has printed, and where the rest stands."""
    with contextlib.suppress(OSError):
        lines = _log(folder, name).read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
        return f": {shortened(lines[-1], 300)} ({_log(folder, name)})" if lines else ""
    return ""


def _followed(owner: Member, run: str, started: Mapping[str, subprocess.Popen[bytes]], tell: Tell) -> dict[str, Any]:
    def watched(line: str) -> None:
        _alive(owner.kit.folder.parents[1], started)
        if line:
            tell(line)

    return commanding.keep_going(owner, run, watched, _LOOK_S)


def in_words(table: Mapping[str, Any]) -> list[str]:
    """What happened, for people."""
    lines = [f"{table['run']}: {table['state']} in {table['seconds']:.0f} s; the server and all sites have ended"]
    private = "epsilon" in table
    last = "epsilon" if private else "accuracy"
    lines.append(f"  {'site':20} {'rank':>5} {'rounds':>7} {'examples':>9} {last:>9}{'  releases' if private else ''}")
    for row in table["sites"]:
        figure = "" if row[last] is None else f"{row[last]:.3f}"
        count = f" {row['releases']:>9}" if private else ""
        lines.append(
            f"  {row['name']:20} {_or(row['rank']):>5} {row['rounds']:>7} {_or(row['train_examples']):>9} {figure:>9}{count}"
        )
    if private:
        lines.append(f"  epsilon by each site's own ledger, at delta = {table['sites'][0]['delta']:g}")
    return [*lines, f"run folder: {table['folder']}"]


def _or(value: Any) -> str:
    return "" if value is None else str(value)

"""A federation over Flower: what runs its rounds, and the three commands of its parties.

    python -m anyrank.deployment.flower server FOLDER     SuperLink, and the process that starts runs
    python -m anyrank.deployment.flower site FOLDER       SuperNode, and the site's worker beside it
    python -m anyrank.deployment.flower submit CONFIG --server FOLDER [--wait]

See docs/flower.md. Exit status: 0 done, 1 the run failed, 2 the request is wrong, with one line that says how to fix it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anyrank import stopping
from anyrank.config.tables import from_table, read_toml, to_table
from anyrank.engines.flower import attendant, launch, relay, runs, settings
from anyrank.errors import AnyRankError, ConfigError, RunFailed
from anyrank.files import write_whole_text
from anyrank.remote import kits
from anyrank.runs import names

ROUNDS = "anyrank.deployment.flower:Rounds"
_CONNECTION = "anyrank"
_LOOK_S, _ASK_S = 0.5, 30.0  # between two looks at how a run stands, and between two questions to Flower, which cost seconds
_ENDED = ("finished:completed", "finished:failed", "finished:stopped")
_UP_S = 60.0  # that `submit` waits for the SuperLink
_FLWR_S = 120.0  # that Flower's own command may take


class Rounds:
    """Runs the rounds of a run, from its checkpoint where there is one."""

    def serve(self, job: Any) -> None:
        from anyrank.deployment.running import federate

        config = from_table(read_toml(job.folder / runs.SUBMITTED, "configuration"))
        out = job.folder / runs.RUN
        sites = {site.name: partial(_worker, job, site.name) for site in config.sites}

        def after(row: Mapping[str, Any]) -> None:
            job.told(row["round"], config.run.rounds)

        federate(config, sites, out, resume=(out / names.CONFIG).exists(), on_round=after)


def _worker(job: Any, site: str, opening: Any, opened: Any, receive: Any) -> Any:
    return job.worker(site, opening, opened, job.reply, receive)


# --- commands --------------------------------------------------------------------------------------------------------


def server(folder: Path) -> int:
    """Run the server's processes until a signal ends this one."""
    known = settings.load(settings.Server, folder)
    parts = launch.server(folder, known, ROUNDS)
    alone = relay.listen(folder / settings.STATE / "socket")  # held until this process ends: one server for a folder
    _connect(folder, known)
    family = launch.Family(parts, folder / settings.STATE)
    print(f"server: SuperLink on 127.0.0.1:{known.port}; end it with Ctrl-C", flush=True)
    family.follow()
    alone.close()
    return 0


def site(folder: Path) -> int:
    """Run a site's processes, and its worker when it is asked, until a signal ends this one."""
    from anyrank.worker import sitefile

    known, path = settings.load(settings.Site, folder), folder.absolute() / settings.SITE
    own, limits = sitefile.load(str(path)), kits.limits(path)
    room = folder / settings.STATE / "socket"
    parts = launch.site(folder, known, own.name, relay.address(room))
    words, env = attendant.command(path, known.python)
    beside = attendant.Attendant(own.name, limits, attendant.maker(limits, words, env))
    listener = relay.listen(room)
    threading.Thread(target=beside.serve, args=(listener,), daemon=True).start()
    family = launch.Family(parts, folder / settings.STATE)
    print(f"site {own.name}: connects to {known.server}; end it with Ctrl-C", flush=True)
    family.follow()
    return 0


def submit(config: Path, folder: Path, wait: bool = False) -> int:
    """Submit a configuration to the server of `folder`, on the server's machine. The same one again goes on where it stood."""
    from anyrank import methods  # with torch
    from anyrank.deployment.public import check, check_labels, kept

    known = settings.load(settings.Server, folder)
    asked = from_table(read_toml(config, "configuration"))
    check(asked, methods.make(asked.method.name, asked.method.options))
    check_labels(asked)
    run = runs.keep(folder, asked.run.name, to_table(kept(asked)))
    standing = runs.said(run)
    if standing.get("state") == "running" and not _has_ended(folder, str(standing.get("number"))):
        raise ConfigError(
            f"run {asked.run.name}: it is running; stop it first: flwr stop {standing.get('number')} {_CONNECTION}"
        )
    runs.say(run, runs.Standing(asked.run.name), state="submitted")
    _connect(folder, known)
    _await_port(known.port)
    number = _flwr(folder, "run", str(runs.app_of(folder, asked.run.name)), _CONNECTION, "--format", "json")["run-id"]
    print(f"run {asked.run.name}: submitted; its folder is {run / runs.RUN}", flush=True)
    return _wait(folder, run, str(number)) if wait else 0


def _wait(folder: Path, run: Path, number: str) -> int:
    """Show rounds until the run has ended, by its own word or by Flower's."""
    shown, asked = 0, time.monotonic()
    while True:
        standing = runs.said(run)
        if standing.get("round", 0) > shown:
            shown = standing["round"]
            print(f"round {shown} of {standing['rounds']}", flush=True)
        if standing.get("state") == "done":
            print("done", flush=True)
            return 0
        if standing.get("state") == "failed":
            raise RunFailed(f"run {run.name}: {standing.get('text') or standing.get('code')}")
        late = time.monotonic() - asked > _ASK_S
        asked = time.monotonic() if late else asked
        if late and _has_ended(folder, number) and runs.said(run) == standing:
            raise RunFailed(f"run {run.name}: it was stopped or its process ended; submit it again to go on")
        time.sleep(_LOOK_S)


def _await_port(port: int) -> None:
    """Wait until the SuperLink listens, for a while: it takes seconds to start."""
    until = time.monotonic() + _UP_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), _LOOK_S):
            return
        if time.monotonic() > until:
            raise RunFailed(f"server: nothing listens on 127.0.0.1:{port}; start it with `server` first")
        time.sleep(_LOOK_S)


def _has_ended(folder: Path, number: str) -> bool:
    found = _flwr(folder, "ls", _CONNECTION, "--run-id", number, "--format", "json").get("runs", [])
    return any(each.get("status") in _ENDED for each in found)


def _connect(folder: Path, known: settings.Server) -> None:
    """Tell Flower's own command where the SuperLink is."""
    how = f'root-certificates = "{known.ca}"' if known.ca else "insecure = true"
    home = Path(launch.environment(folder)["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    text = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{known.port}"\n{how}\n'
    write_whole_text(home / "config.toml", text)


def _flwr(folder: Path, *words: str) -> dict[str, Any]:
    """What Flower's own command replies in JSON. Raises `RunFailed`, in one line."""
    env = {**os.environ, **launch.environment(folder)}
    try:
        found = subprocess.run(
            [launch.program("flwr"), *words], env=env, capture_output=True, text=True, timeout=_FLWR_S, stdin=subprocess.DEVNULL
        )
        reply = json.loads(found.stdout)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"flwr {words[0]}: no reply within {_FLWR_S:g} s; is `server` running?") from None
    except ValueError:
        lines = (found.stderr or found.stdout).strip().splitlines() or [f"status {found.returncode}"]
        raise RunFailed(f"flwr {words[0]}: {lines[-1][:200]}; is `server` running?") from None
    if not isinstance(reply, dict) or not reply.get("success"):
        raise RunFailed(f"flwr {words[0]}: {str(reply.get('error-message', reply))[:200]}")
    return reply


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m anyrank.deployment.flower", description="A federation over Flower.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("server", "run the server"), ("site", "run a site")):
        verbs.add_parser(verb, help=text).add_argument("folder", type=Path)
    one = verbs.add_parser("submit", help="submit a configuration, on the server's machine")
    one.add_argument("config", type=Path)
    one.add_argument("--server", type=Path, required=True, help="the server's folder")
    one.add_argument("--wait", action="store_true", help="show rounds until the run has ended")
    asked = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stopping.on_signals()
    try:
        if asked.verb == "submit":
            return submit(asked.config, asked.server, asked.wait)
        return {"server": server, "site": site}[asked.verb](asked.folder)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except AnyRankError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

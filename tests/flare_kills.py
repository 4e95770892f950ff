"""A server over three sites that is killed with -9 in each phase of a round, and goes on: `python flare_kills.py WORLD OUT`.

Everything is loaded once; each server is a child of this process, made by `fork`. Sites are desks of real site workers in the
server's own process, asked by frames, with stores that outlive it. Prints one JSON object: for each phase how the server ended,
which rounds its log has, how many rounds were run, and whether the adapters have the bytes of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flare_deeds
import site_world
from anyrank import deployment
from anyrank.config.tables import from_table
from anyrank.messages import calls
from anyrank.worker.site import SiteDesk
from anyrank.worker.sitefile import load

METHOD = "fedsa"  # whose sites keep parts of their own
ROUNDS, STRUCK = 3, 2


class Site:
    """A site's worker in this process, in the place of one beside it."""

    def __init__(self, path: Path, opening: Any, opened: Any, receive: Any) -> None:
        self.path, self.opening, self.opened, self.desk = path, opening, opened, None

    def start(self, timeout_s: float | None = None) -> None:
        if self.desk is None:
            self.desk = SiteDesk(load(self.path))
            self.opened(next(iter(self.desk.answer(self.opening(), None, lambda frame: None))))

    def ask(self, frames: Any, replies: int, timeout_s: float | None = None) -> Iterator[Any]:
        self.start()
        waiting = list(frames)
        while waiting:
            yield from self.desk.answer(waiting.pop(0), lambda: waiting.pop(0), lambda frame: None)

    def kill(self) -> None: ...

    revive = end = kill

    def close(self) -> None:
        if self.desk:
            self.desk.close()


def serve(world: Path, place: Path, phase: str = "", round: int = STRUCK) -> int:
    """The status of a server, a child: `-9` if it was killed. Each of its rounds is noted in `ran`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        events = flare_deeds.arm(phase, round, lambda: os.kill(os.getpid(), signal.SIGKILL))
        note(place)
        public = site_world.table(METHOD, eval={"where": "sites"}, run={"rounds": ROUNDS})
        public["sites"] = [one | {"source": "at the site"} for one in public["sites"]]
        files = {name: site_world.site_file(place, name, data={"source": str(world / f"{name}.csv")},
                                            model={"folder": str(world / "model")}, accept={"scores": True})
                 for name in site_world.RANKS}  # fmt: skip
        sites = {name: partial(Site, path) for name, path in files.items()}
        out = place / "run"
        deployment.federate(from_table(public), sites, out, resume=(out / "config.toml").exists(), wait_s=0)
        (place / "events.json").write_text(json.dumps(events))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def warm(world: Path, out: Path) -> None:
    """Have everything loaded that a child would load."""
    asked = site_world.Asked(site_world.site_file(world, "county", store="store-warm"))
    asked.ask(site_world.setup(site_world.table(METHOD)))
    asked.close()


def note(place: Path) -> None:
    """Let each round that is begun add a line."""
    from anyrank.federation import loop

    honest = loop.ask

    def ask(federation: Any, ledger: Any, quarantine: Any, state: Any) -> Any:
        with open(place / "ran", "a") as file:
            file.write(f"{state.round + 1}\n")
        return honest(federation, ledger, quarantine, state)

    loop.ask = ask


def digest(run: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(run.glob("adapter*/*")):
        total.update(f"{path.relative_to(run)}".encode() + path.read_bytes())
    return total.hexdigest()


def rounds(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["round"] for line in path.read_text().splitlines()] if path.exists() else []


def main(world: Path, out: Path) -> dict[str, Any]:
    warm(world, out)
    quiet = out / "quiet"
    quiet.mkdir(parents=True)
    assert serve(world, quiet) == 0
    events = json.loads((quiet / "events.json").read_text())
    assert calls.COHORT  # the frames that sites are asked by
    phases = {(phase, STRUCK) for phase in flare_deeds.PHASES} | {(f"write event {n + 1}", STRUCK) for n in range(len(events))}
    phases |= {(phase, ROUNDS) for phase in flare_deeds.ENDS}
    found: dict[str, Any] = {}
    for number, (phase, round) in enumerate(sorted(phases)):
        place = out / str(number)
        place.mkdir()
        killed = serve(world, place, phase, round)
        reached = rounds(place / "run")
        again = serve(world, place)
        ran = (place / "ran").read_text().split()
        found[phase] = {"killed": killed, "reached": reached, "again": again, "rounds": rounds(place / "run"), "ran": len(ran),
                        "same": digest(place / "run") == digest(quiet / "run")}  # fmt: skip
    return {"events": events, "phases": found}


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), Path(sys.argv[2])), sys.stdout)

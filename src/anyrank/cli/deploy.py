"""`anyrank deploy`: a federation over real machines, from its first file to its last round."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="A federation over real machines: kits, checks, runs. Each verb says what to type next.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
KitFolder = Annotated[Path, typer.Argument(metavar="KIT", help="The folder of a kit.")]
OwnKit = Annotated[Path, typer.Option("--kit", metavar="KIT", help="The kit of an owner, or of a viewer to look only.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The name of a run, run.name in its configuration.")]


@app.command()
def init(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the federation; made where it is missing.")],
    sites: Annotated[str, typer.Option("--sites", metavar="A,B,...", help="The names of the sites.")],
    host: Annotated[
        str, typer.Option("--host", help="The server's name or address for the sites; localhost: this machine only.")
    ] = "localhost",
    port: Annotated[int, typer.Option("--port", help="The server's port.")] = 8002,
    name: Annotated[str, typer.Option("--name", help="The federation's name; default: that of the folder.")] = "",
    owner: Annotated[
        str, typer.Option("--owner", help="The first owner, in the form of an e-mail address.")
    ] = "owner@example.org",
    as_json: Json = False,
) -> None:
    """Write federation.toml, a file for each site, and an example of a run: to be read and edited. Nothing is overwritten.

    Example: [cyan]anyrank deploy init three --sites st-mary,lakeside,county --host fl.example.org[/cyan]
    """
    from anyrank.config.federation import FederationFile, Person, ServerPlace
    from anyrank.parties import provisioning

    listed = tuple(each.strip() for each in sites.split(",")) if sites.strip() else ()
    chosen = name or place.absolute().name
    federation = FederationFile(chosen, listed, ServerPlace(host, (), port), people=(Person(owner, "owner"),))
    written = provisioning.initialise(place, federation)
    _finish(
        as_json,
        {"federation": chosen, "written": [str(path) for path in written]},
        [f"wrote {path}" for path in written],
        f"read {place}/federation.toml, then: anyrank deploy provision {place}",
    )


@app.command()
def provision(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="The folder with federation.toml.")] = Path(),
    renew: Annotated[
        list[str],
        typer.Option("--renew", metavar="NAME", help="Give this party, or all, a new key and certificate; repeatable."),
    ] = [],  # noqa: B006 - Typer's way
    as_json: Json = False,
) -> None:
    """Make a kit for each party: certificates and settings, a folder and an archive to send. Again after every change.

    Example: [cyan]anyrank deploy provision three[/cyan]
    """
    from anyrank.config import federation as federations

    federations.load(place)
    from anyrank.parties import provisioning

    federation, made = provisioning.provision(place, renew)
    kept = provisioning.former(place, federation)
    rows = [
        {"name": each.name, "role": each.role, "state": each.state, "until": each.until.isoformat(), "kit": str(each.folder)}
        | {"archive": str(each.archive), "sha256": each.fingerprint}
        for each in made
    ]
    lines = [
        f"{each['state']:9} {each['role']:6} {each['name']}: {each['archive']}, valid until {each['until']}" for each in rows
    ]
    lines += [
        f"{path}: no party of {federation.name} any more; docs/deploy.md, Remove a site, says what is left to do"
        for path in kept
    ]
    server = place / provisioning.KITS / "server"
    _finish(
        as_json,
        {"federation": federation.name, "parties": rows, "former": [str(path) for path in kept]},
        lines,
        f"send each archive to its party only; then, on the server: anyrank deploy start {server}",
    )


@app.command()
def start(
    kit: KitFolder,
    service: Annotated[
        bool, typer.Option("--service", help="Print a systemd unit that starts the kit with the machine; start nothing.")
    ] = False,
    container: Annotated[
        bool, typer.Option("--container", help="Print a container file for servers and sites; start nothing.")
    ] = False,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="Write this file when it is connected, for scripts.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a kit, then start its server or site here in the foreground, until Ctrl-C.

    Example: [cyan]anyrank deploy start kits/st-mary[/cyan]
    """
    from anyrank.parties import starting

    if container:
        return _show_text(as_json, "container_file", starting.container(kit))
    if service:
        return _show_text(as_json, "unit", starting.service(kit))
    ready = starting.ready(kit)

    def tell(line: str) -> None:
        text = json.dumps({"kit": str(kit), "event": line}) if as_json else line
        sys.stdout.write(f"{_shown(text)}\n")
        sys.stdout.flush()

    tell(f"{ready.label}: checks passed; starting")
    number = starting.serve(ready, tell, ready_file)
    tell(f"{ready.label}: stopped; nothing of it is running")
    raise typer.Exit(128 + number)


@app.command()
def doctor(kit: KitFolder, as_json: Json = False) -> None:
    """Examine a kit and its machine: certificate, versions, clock, disk, data, base model, the way to the server.

    Each line is ok, or says how to fix it. Exit status 2 if something is wrong.

    Example: [cyan]anyrank deploy doctor kits/st-mary[/cyan]
    """
    from anyrank.parties import doctor as doctors
    from anyrank.parties import kits

    kits.open_kit(kit)
    found = []
    for each in doctors.examine(kit):
        found.append(each)
        if not as_json:
            sys.stdout.write(_shown(f"{each.mark:6}{each.what:12}{each.words}") + "\n")
    wrong = sum(not each.ok for each in found)
    table = {"kit": str(kit), "findings": [{"what": each.what, "state": each.mark, "words": each.words} for each in found]}
    _finish(as_json, table | {"wrong": wrong}, [], doctors.following(kit, wrong))
    if wrong:
        raise typer.Exit(2)


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration of the run, with its named sites.")],
    kit: OwnKit,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Stay, and submit again where a server was lost, until the run is done.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit a run to the server. It brings no code, and no path of anybody's data.

    Example: [cyan]anyrank deploy submit run.toml --kit kits/owner@example.org --keep-going[/cyan]
    """
    from anyrank.parties import commanding

    owner = commanding.owner(kit)
    request = commanding.request(owner, config)
    job = commanding.submit(owner, request)
    if keep_going:
        return _follow(owner, request.run, as_json, f"submitted {request.run} to {owner.where}")
    table = {"run": request.run, "job": job, "sites": list(request.sites)}
    _finish(as_json, table, [f"submitted {request.run} to {owner.where}"], f"anyrank deploy status --watch --kit {kit}")


@app.command()
def status(
    kit: OwnKit,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing what changes, until no run waits or runs, or Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the server, the sites that are connected, and the runs: also one that only seems to run.

    Example: [cyan]anyrank deploy status --watch --kit kits/owner@example.org[/cyan]
    """
    from anyrank.parties import commanding

    reader = commanding.reader(kit)
    before: list[str] = []
    while True:
        table = commanding.status(reader)
        lines = commanding.in_words(table)
        if as_json:
            sys.stdout.write(json.dumps(table) + "\n" if watch else json.dumps(table, indent=2) + "\n")
        else:
            _say(lines if not before else [line for line in lines if line not in before])
        sys.stdout.flush()
        if not watch or not commanding.under_way(table):
            if not as_json:
                _say([f"next: {commanding.following(table, kit)}"])
            return
        before = lines
        time.sleep(commanding.LOOK_S)


@app.command()
def stop(run: RunName, kit: OwnKit, as_json: Json = False) -> None:
    """Stop a run. What its last whole round has reached stays on the server, and it can be resumed.

    Example: [cyan]anyrank deploy stop first --kit kits/owner@example.org[/cyan]
    """
    from anyrank.parties import commanding

    jobs = commanding.stop(commanding.owner(kit), run)
    _finish(as_json, {"run": run, "stopped": jobs}, [f"stopped {run}"], f"anyrank deploy resume {run} --kit {kit}")


@app.command()
def resume(
    run: RunName,
    kit: OwnKit,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Stay, and submit again where a server was lost, until the run is done.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Go on with a run that was stopped, or whose server was lost: from its last whole round.

    Example: [cyan]anyrank deploy resume first --kit kits/owner@example.org[/cyan]
    """
    from anyrank.parties import commanding

    owner = commanding.owner(kit)
    job = commanding.resume(owner, run)
    if keep_going:
        return _follow(owner, run, as_json, f"resumed {run}")
    _finish(as_json, {"run": run, "job": job}, [f"resumed {run}"], f"anyrank deploy status --watch --kit {kit}")


@app.command()
def leave(
    kit: KitFolder,
    undo: Annotated[bool, typer.Option("--undo", help="Return: let the site be started again.")] = False,
    as_json: Json = False,
) -> None:
    """End this site's part, on the site's own machine: its processes end, and it cannot be started until it returns.

    Example: [cyan]anyrank deploy leave kits/st-mary[/cyan]
    """
    from anyrank.parties import kits, starting

    opened = kits.open_kit(kit, ("site",))
    words = starting.leave(opened, undo)
    following = f"anyrank deploy start {kit}" if undo else f"to return: anyrank deploy leave --undo {kit}"
    _finish(as_json, {"site": opened.name, "left": not undo}, [f"{opened.name}: {words}"], following)


@app.command()
def remove(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The name of a site.")],
    kit: OwnKit,
    undo: Annotated[bool, typer.Option("--undo", help="Let the site connect again.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a site out: the server refuses it from now on, although its certificate is valid until it ends.

    Example: [cyan]anyrank deploy remove lakeside --kit kits/owner@example.org[/cyan]
    """
    from anyrank.parties import commanding

    commanding.remove(commanding.owner(kit), site, undo)
    words = f"{site} may connect again" if undo else f"{site} is kept out; what it contributed stays"
    following = f"anyrank deploy status --kit {kit}" if undo else "take it out of sites in federation.toml, and provision again"
    _finish(as_json, {"site": site, "kept_out": not undo}, [words], following)


@app.command()
def rehearse(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration of the run, with its named sites.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder for kits and runs; default: runs/NAME-rehearsal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Do all of it on this machine: kits, server and sites on loopback, the run, its end. Needs no network.

    Example: [cyan]anyrank deploy rehearse run.toml[/cyan]
    """
    from anyrank.cli import arguments
    from anyrank.config.federation import check_sites

    chosen = arguments.configuration(config, [])
    check_sites([site.name for site in chosen.sites])
    from anyrank.parties import rehearsal

    folder = out or Path("runs") / f"{chosen.run.name}-rehearsal"
    tell = (lambda line: None) if as_json else (lambda line: _say([line], flush=True))
    table = rehearsal.rehearse(chosen, folder, tell)
    _finish(
        as_json,
        table,
        rehearsal.in_words(table),
        f"the same over machines: anyrank deploy init DIR --sites {','.join(site.name for site in chosen.sites)}",
    )


def _follow(owner: Any, run: str, as_json: bool, begun: str) -> None:
    from anyrank.parties import commanding

    tell = (lambda line: None) if as_json else (lambda line: _say([line] if line else [], flush=True))
    tell(begun)
    table = commanding.keep_going(owner, run, tell)
    _finish(
        as_json,
        table,
        [f"{run}: {table['state']} after {table['jobs']} job{'s' if table['jobs'] != 1 else ''}"],
        f"anyrank deploy status --kit {owner.kit.folder}",
    )


def _finish(as_json: bool, table: Mapping[str, Any], lines: Iterable[str], following: str) -> None:
    """The end of a verb: its lines and what to type next, or all of it as one JSON object."""
    if as_json:
        sys.stdout.write(json.dumps({**table, "next": following}, indent=2) + "\n")
    else:
        _say([*lines, f"next: {following}"])


def _say(lines: Iterable[str], flush: bool = False) -> None:
    for line in lines:
        sys.stdout.write(_shown(line) + "\n")
    if flush:
        sys.stdout.flush()


def _shown(text: str) -> str:
    from anyrank.errors import printable

    return printable(text)


def _show_text(as_json: bool, name: str, text: str) -> None:
    sys.stdout.write(json.dumps({name: text}, indent=2) + "\n" if as_json else text)


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the other verbs have it

"""The verb `serve`: the status page of runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

_NEEDED = ("starlette", "uvicorn", "anyio")


def serve(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS ...", help="Run folders, or folders with runs in them.")],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond loopback, give --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0: a free one.")] = 8030,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the token that opens the page; made if it is not there.")
    ] = None,
    names: Annotated[
        list[str], typer.Option("--name", help="Host name that the page is reached by, if it is another; repeatable.")
    ] = [],  # noqa: B006 - Typer's way
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the address, then serve.")] = False,
) -> None:
    """Show the status of runs in a browser, live and after their end. Reads run folders alone; changes nothing.

    Example: [cyan]anyrank serve runs[/cyan]
    """
    from anyrank.errors import ConfigError, RunError

    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"serve needs {' and '.join(missing)}; pip install 'anyrank[web]'")
    from anyrank.service import running

    if token_file is None and not running.is_loopback(host):
        raise ConfigError(f"--host {host}: others could read the page; give --token-file FILE, which is made if missing")
    from anyrank.cli import console
    from anyrank.service.app import build
    from anyrank.service.watch import Watch

    watch = Watch(runs)
    token, made = running.token_in(token_file) if token_file else ("", False)
    address = running.listen(host, port)

    def ready() -> None:
        if as_json:
            found = {"url": address.url, "port": address.socket.getsockname()[1], "token_file": str(token_file or "")}
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            return
        console.out.print(f"status page  {console.shown(address.url)}", soft_wrap=True)
        if token_file:
            what = "made, for this user alone" if made else "as it was"
            console.out.print(f"token        in {console.shown(token_file)} ({what}); add ?token=... once", soft_wrap=True)
        console.out.print("Ctrl-C ends it; the runs go on.", soft_wrap=True)

    running.serve(address, build(watch, [host, *names], token), ready)

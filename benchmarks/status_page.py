"""Time the status page of a run of 200 sites and 500 rounds: how long it takes to read, a page, and an event.

    python benchmarks/status_page.py [--sites 200] [--rounds 500] [--times 20]

Prints one JSON object; times in seconds: least, median and largest. The run is made up, with a site that is waited for. A page
is asked for once every second, so that each is made anew. An event is a round that is appended to the logs, timed from its last
byte to the listener's line.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("least", "median", "largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("sites", 200), ("rounds", 500), ("times", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = made(Path(place) / "run", given.sites, given.rounds)
        began = time.perf_counter()
        with served(run) as port:
            figures = {
                "sites": given.sites,
                "rounds": given.rounds,
                "log_bytes": sum(each.stat().st_size for each in run.glob("*l")),
            }
            figures |= {"until_all_is_read": round(read(port, given.rounds) - began, 2)}
            figures |= {path: pages(port, path, given.times) for path in ("/", "/runs.json", "/metrics")}
            figures |= {"event": events(port, run, given.sites, given.rounds, given.times)}
    print(json.dumps(figures, indent=2))


def made(run: Path, sites: int, rounds: int) -> Path:
    run.mkdir()
    names = [f"site-{number}" for number in range(sites)]
    tables = "".join(f'[[sites]]\nname = "{name}"\nrank = 8\nsource = "{name}.csv"\n' for name in names)
    (run / "config.toml").write_text(f'[run]\nname = "run"\nrounds = {2 * rounds}\n[method]\nname = "raflora"\n{tables}')
    for number in range(1, rounds + 1):
        add(run, number, names)
    for name in names:
        own = run / "sites" / name / "adapter"
        own.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors", "../labels.json", "../scores.json"):
            (own / file).write_text("{}")
    wait = {"round": rounds + 1, "began": time.time() - 90, "heard": 0, "asked": sites, "missing": 1, "waiting_for": names[:1]}
    (run / "status.json").write_text(json.dumps(wait))
    return run


def add(run: Path, number: int, names: list[str]) -> float:
    """Append a round; returns when that was done."""
    bad, good = {"status": "rejected", "reason": "layer x, B: contains NaN"}, {"status": "ok", "reason": ""}
    rows = [
        {"round": number, "client": name, "rank": 8, "num_examples": 100, "loss": 1.0, "seconds": 1.5, "shortened": None}
        | (bad if (number + at) % 50 == 0 else good)
        for at, name in enumerate(names)
    ]
    scores = {name: {"accuracy": (number + at) % 100 / 100, "loss": 1.0, "test_examples": 20} for at, name in enumerate(names)}
    figures = {"accuracy": 0.5, "loss": 1.0, "collapse": 0.3, "upload_bytes": 1, "download_bytes": 1, "seconds": 2.0}
    metrics = {"round": number, **figures, "clients": len(names), "rejected": 0, "idle": "", "sites": scores}
    with open(run / "clients.jsonl", "a") as clients, open(run / "metrics.jsonl", "a") as log:
        clients.writelines(json.dumps(row) + "\n" for row in rows)
        clients.flush()
        log.write(json.dumps(metrics) + "\n")
    return time.perf_counter()


@contextlib.contextmanager
def served(run: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "anyrank", "serve", str(run), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield json.loads(process.stdout.readline())["port"]
    finally:
        process.kill()
        process.wait()


def ask(port: int, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
    return connection.getresponse()


def read(port: int, rounds: int) -> float:
    """Wait until the service has read the whole run; returns when."""
    while json.loads(ask(port, "/runs.json").read())["runs"][0]["round"] < rounds:
        time.sleep(0.05)
    return time.perf_counter()


def pages(port: int, path: str, times: int) -> dict[str, object]:
    firsts, wholes, body = [], [], b""
    for _ in range(times):
        time.sleep(1.0)
        began = time.perf_counter()
        answer = ask(port, path)
        answer.read(1)
        firsts.append(time.perf_counter() - began)
        answer.read()
        wholes.append(time.perf_counter() - began)
    body = ask(port, path).read()
    plain = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
    return {"first_byte": spread(firsts), "whole": spread(wholes), "sent_bytes": len(body), "bytes": len(plain)}


def events(port: int, run: Path, sites: int, rounds: int, times: int) -> dict[str, float]:
    key = json.loads(ask(port, "/runs.json").read())["runs"][0]["key"]
    stream, waits = ask(port, f"/run/{key}/events"), []
    names = [f"site-{number}" for number in range(sites)]
    for number in range(rounds + 1, rounds + 1 + times):
        time.sleep(0.7)
        added = add(run, number, names)
        while f'"round": {number}, "accuracy"' not in stream.readline().decode():
            pass
        waits.append(time.perf_counter() - added)
    return spread(waits)


def spread(seconds: list[float]) -> dict[str, float]:
    found = (min(seconds), statistics.median(seconds), max(seconds))
    return {name: round(value, 4) for name, value in zip(NAMES, found, strict=True)}


if __name__ == "__main__":
    main()

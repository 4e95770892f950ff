"""Run the studies of `configs/papers/` and write their tables and figures into `docs/results.md`: `make experiments`.

Data sets are looked for in `$ANYRANK_DATA` (see the configurations for what belongs there). Runs are kept in `runs/papers`, so
that a second call goes on where the first one stopped. A study's block in the page is written anew; the text around it stays.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAPERS, RUNS = ROOT / "configs" / "papers", ROOT / "runs"
PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
UNGUARDED = ("guard.norm=0", "guard.far=0", "guard.owner=1")  # methods as their papers define them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", help="names of studies, e.g. 1-rank-collapse; default: all")
    chosen = parser.parse_args().studies or sorted(path.stem for path in PAPERS.glob("*.toml"))
    for name in chosen:
        write_block(name, *run(name))


def run(name: str) -> tuple[float, str]:
    """Run one study by its command; returns the wall time in seconds and the day it ended."""
    from anyrank.runs.finding import is_finished
    from anyrank.studies import study as studies

    out = RUNS / "papers" / name
    study = studies.load(PAPERS / f"{name}.toml")
    left = sum(not is_finished(cell.out) for cell in study.cells(out))
    sys.stderr.write(f"{name}: {left} of {len(study.cells(out))} runs to go, {study.minutes:g} minutes in all on two cores\n")
    began = time.monotonic()
    command = [sys.executable, "-m", "anyrank", "study", str(PAPERS / f"{name}.toml"), "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)
    return time.monotonic() - began, datetime.date.today().isoformat()


def write_block(name: str, wall_s: float, day: str) -> None:
    """Put the study's table, figure and circumstances into its block of the page."""
    from anyrank.studies import study as studies

    study, out = studies.load(PAPERS / f"{name}.toml"), RUNS / "papers" / name
    lines = [f"*{study.claim}*", f"`anyrank study configs/papers/{name}.toml` · {circumstances(wall_s, day)}"]
    lines.append((out / studies.TABLE).read_text().strip())
    if study.figure != "none":
        PICTURES.mkdir(exist_ok=True)
        (PICTURES / f"{name}.png").write_bytes((out / "figure.png").read_bytes())
        lines.append(f"![{study.title}](results/{name}.png)")
    put(name, study.title, lines)


def put(name: str, title: str, lines: Sequence[str]) -> None:
    """Write `lines` between the marks of the block `name` in the page; under a heading at its end where there are none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    block = "\n\n".join([begin, *lines, end])
    page = PAGE.read_text()
    marked = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.S)
    if marked.search(page):
        page = marked.sub(lambda _: block, page)
    else:
        page = f"{page.rstrip()}\n\n## {title}\n\n{block}\n"
    PAGE.write_text(page)


def circumstances(wall_s: float, day: str) -> str:
    """Commit, day, machine and time, in one line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    state = f"commit {commit or 'unknown'}{' with changes' if changed else ''}"
    return f"{state}, {day}, {platform.machine()}, Python {platform.python_version()}, last call {wall_s / 60:.1f} min"


if __name__ == "__main__":
    main()

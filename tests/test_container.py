"""The container file, as far as it can be tested without a container engine: its words, its sources, and its commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "containers" / "Containerfile"
WORDS = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


def steps() -> list[tuple[str, str]]:
    """The instructions of the file, `(word, rest)`."""
    text = re.sub(r"\\\n", " ", FILE.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def of(word: str) -> list[str]:
    return [rest for each, rest in steps() if each == word]


def copied() -> list[str]:
    return [source for rest in of("COPY") for source in shlex.split(rest)[:-1]]


def test_it_has_known_instructions_in_an_order_that_works() -> None:
    words = [word for word, _ in steps()]
    assert set(words) <= WORDS
    assert words[0] == "FROM"
    last = {word: len(words) - 1 - words[::-1].index(word) for word in set(words)}
    assert last["COPY"] < words.index("RUN") < last["RUN"] < words.index("USER")  # root installs, and nothing runs as root
    assert of("USER") == ["anyrank"]
    assert re.search(r"useradd .*--uid 1000 anyrank\b", " ".join(of("RUN")))


def test_what_it_copies_is_in_the_repository_and_reaches_the_builder() -> None:
    assert copied()
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*"  # what is not named is not sent: no kit, no key, no data, no run
    admitted = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert admitted == set(copied())
    for source in copied():
        assert (ROOT / source).exists(), source
    taken_out = [line for line in ignore[1:] if not line.startswith("!")]
    assert not [name for name in admitted for pattern in taken_out if fnmatch(name, pattern.removeprefix("**/"))]


def test_what_it_installs_is_what_the_package_has_and_the_server_and_a_site_need() -> None:
    command = next(shlex.split(rest) for rest in of("RUN") if rest.startswith("pip install"))
    assert command[command.index("-c") + 1] in copied()
    wanted = re.fullmatch(r"\.\[(.*)\]", command[-1])[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(wanted) <= project["optional-dependencies"].keys()
    assert {"nvflare", "text", "web", "privacy"} <= set(wanted)
    assert {project["readme"], *project["license-files"], "pyproject.toml", "src"} <= set(copied())
    least = project["requires-python"].removeprefix(">=")
    image = re.fullmatch(r"python:(\d+)\.(\d+)-slim", of("FROM")[0])
    assert (int(image[1]), int(image[2])) >= tuple(map(int, least.split(".")))


@pytest.mark.parametrize("words", [(), ("deploy", "doctor"), ("serve",)])
def test_its_entry_point_answers(words: tuple[str, ...]) -> None:
    entry, command = json.loads(of("ENTRYPOINT")[0]), list(words) or json.loads(of("CMD")[0])[:-1]
    assert entry[0] == "python"
    done = subprocess.run([sys.executable, *entry[1:], *command, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "KIT" in done.stdout or "RUNS" in done.stdout


def test_the_kit_is_mounted_where_the_command_looks_for_it() -> None:
    assert json.loads(of("VOLUME")[0]) == [json.loads(of("CMD")[0])[-1]]
    assert of("STOPSIGNAL") == ["SIGTERM"]  # at which `deploy start` ends its processes in order

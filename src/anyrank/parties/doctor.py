"""`anyrank deploy doctor`: what may keep a party from taking part, found before it does. It changes nothing."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import http.client
import platform
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from anyrank import __version__
from anyrank.errors import AnyRankError, in_a_line
from anyrank.parties import certificates, kits, policies, siting, starting
from anyrank.parties.findings import Finding
from anyrank.parties.kits import Kit
from anyrank.parties.policies import RUNNING, SERVER, SITE

NVFLARE = (2, 9)  # the only minor version that this one works with
_LEAST_DISK, _LEAST_MEMORY = 2 << 30, 1 << 30  # bytes that should be free
_MOST_SKEW_S = 60.0
_WAIT_S = 5.0


def examine(folder: Path) -> Iterator[Finding]:
    """The findings on the kit at `folder`, as they come. Raises `DeployError` for what is no kit."""
    kit = kits.open_kit(folder)
    yield from _guarded("kit", lambda: _kit(kit))
    yield from _guarded("certificate", lambda: _certificate(kit))
    yield from _guarded("versions", _versions)
    for look in (_policy, _disk, _memory) if kit.role in RUNNING else ():
        yield from _guarded(look.__name__[1:], lambda look=look: look(kit))
    if kit.role == SITE:
        yield from _site(kit)
    yield from _guarded(
        "port" if kit.role == SERVER else "server", lambda: _own_port(kit) if kit.role == SERVER else _round_trip(kit)
    )


def following(folder: Path, wrong: int) -> str:
    """What to type after the findings on the kit at `folder`, of which so many are wrong."""
    kit = kits.open_kit(folder)
    if wrong:
        return f"correct what is wrong, then again: anyrank deploy doctor {folder}"
    if kit.role not in RUNNING or (kit.role == SERVER and starting.running(kit) is not None):
        return f"anyrank deploy status --kit {folder}"
    return f"nothing; {kit.name} is started" if starting.running(kit) is not None else f"anyrank deploy start {folder}"


def _guarded(what: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of `look`; one that it could not look at is a finding, too."""
    try:
        return look()
    except AnyRankError as error:
        return [Finding(what, False, str(error))]
    except OSError as error:
        return [Finding(what, False, in_a_line(error))]


def _kit(kit: Kit) -> list[Finding]:
    found = kits.changes(kit)
    words = f"{kit.role} {kit.name} of {kit.federation}, as it was provisioned"
    return [Finding("kit", False, each) for each in found] or [Finding("kit", True, words)]


def _certificate(kit: Kit) -> list[Finding]:
    now = datetime.datetime.now(datetime.UTC)
    host = kit.host if kit.role == SERVER else ""
    found = certificates.faults(kit.startup, kit.base, kit.name, host, now)
    if found:
        return [Finding("certificate", False, each) for each in found]
    certificate = certificates.read(kit.startup / f"{kit.base}.crt")
    left = certificates.days_left(certificate, now)
    words = f"valid until {certificate.not_valid_after_utc:%Y-%m-%d} ({left} days)"
    if left < certificates.SOON_DAYS:
        return [Finding("certificate", True, f"{words}; {certificates.RENEW} {kit.name}", warns=True)]
    return [Finding("certificate", True, words)]


def _versions() -> list[Finding]:
    own = f"anyrank {__version__}, Python {platform.python_version()}"
    install = "pip install 'anyrank[nvflare,minilm]'"
    try:
        found = metadata.version("nvflare")
    except metadata.PackageNotFoundError:
        return [Finding("versions", False, f"{own}, no NVFlare; install it: {install}")]
    wanted = ".".join(map(str, NVFLARE))
    if not found.startswith(f"{wanted}."):
        return [Finding("versions", False, f"{own}, NVFlare {found}: expected {wanted}; install it: {install}")]
    return [Finding("versions", True, f"{own}, NVFlare {found}; all parties need the same first two numbers")]


def _policy(kit: Kit) -> list[Finding]:
    """That NVFlare itself reads the policies as they are meant: no code, no shell, for nobody."""
    rights = policies.authorization(kit.role)["permissions"]
    denied = all(rights[role][right] == "none" for role in rights for right in ("byoc", "shell_commands"))
    whole = policies.resources(kit.role, kit.folder)
    closed = whole["class_list_enforcement_mode"] == "enforce" and whole["class_allow_list"] == ["anyrank."]
    words = "no code in jobs, no shell commands, no classes but anyrank's, no log leaves this machine"
    return [Finding("policy", denied and closed, words)]


def _disk(kit: Kit) -> list[Finding]:
    free = shutil.disk_usage(kit.folder).free
    words = f"{free / 1e9:.1f} GB free at {kit.folder}"
    if free < _LEAST_DISK:
        return [Finding("disk", False, f"{words}; free at least {_LEAST_DISK / 1e9:.0f} GB")]
    return [Finding("disk", True, words)]


def _memory(kit: Kit) -> list[Finding]:
    import psutil

    found = psutil.virtual_memory()
    words = f"{found.available / 1e9:.1f} of {found.total / 1e9:.1f} GB free"
    if found.available < _LEAST_MEMORY:
        return [Finding("memory", False, f"{words}; end other programs, or use a machine with more")]
    return [Finding("memory", True, words)]


# --- a site's own file ----------------------------------------------------------------------------------------------------


def _site(kit: Kit) -> Iterator[Finding]:
    if not kit.site_file.is_file():
        example = kit.folder / kits.SITE_EXAMPLE
        yield Finding("site.toml", False, f"no such file; copy the example, and edit it: cp {example} {kit.site_file}")
        return
    yield from (found := _guarded("site.toml", lambda: siting.site_file(kit)))
    if not found[0].ok:  # the others would say the same of it
        return
    yield from _guarded("data", lambda: siting.data(kit))
    yield from _guarded("model", lambda: siting.model(kit))


# --- the server, from here ------------------------------------------------------------------------------------------------


def _own_port(kit: Kit) -> list[Finding]:
    if starting.running(kit) is not None:
        return [Finding("port", True, f"the server is started, at port {kit.port}")]
    fault = starting.port_fault(kit)
    return [Finding("port", not fault, fault or f"port {kit.port} is free")]


def _round_trip(kit: Kit) -> list[Finding]:
    """One request to the server with this kit's certificate: how long it takes, and what its clock says."""
    where = f"{kit.host}:{kit.port}"
    context = ssl.create_default_context(cafile=str(kit.startup / "rootCA.pem"))
    context.load_cert_chain(kit.startup / "client.crt", kit.startup / "client.key")
    connection = http.client.HTTPSConnection(kit.host, kit.port, timeout=_WAIT_S, context=context)
    began = time.monotonic()
    try:
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date", "")
    except ssl.SSLCertVerificationError as error:
        return [Finding("server", False, f"{where} is not the server of this kit ({error.verify_message}); ask the owner")]
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or in_a_line(error)
        return [Finding("server", False, f"{where} cannot be reached ({reason}); is it started, and its port open from here?")]
    finally:
        connection.close()
    seconds = time.monotonic() - began
    return [Finding("server", True, f"{where} replied in {seconds * 1000:.0f} ms"), *_clock(date)]


def _clock(date: str) -> list[Finding]:
    there = None
    with contextlib.suppress(ValueError, TypeError):
        there = email.utils.parsedate_to_datetime(date)
    if there is None:
        return []
    skew = (datetime.datetime.now(datetime.UTC) - there.astimezone(datetime.UTC)).total_seconds()
    words = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"
    if abs(skew) > _MOST_SKEW_S:
        return [Finding("clock", False, f"this machine's clock is {words}; set it, for example with: timedatectl set-ntp true")]
    return [Finding("clock", True, words)]

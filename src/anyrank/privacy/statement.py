"""The statement of a private run: one page in plain words for people who decide about data, such as an ethics board.

It says what is promised to whom, how, what is assumed, what is not covered, and what leaves a client. Before a run it has the
planned figures, after it those that were spent. The command and the report show the same text.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyrank.errors import printable

# Partitions in which the client of a row depends on the other rows.
DEALT = frozenset({"iid", "dirichlet", "pathological", "staircase", "quantity", "sampled"})
_LIBRARIES = {"pld": "dp-accounting", "rdp": "dp-accounting", "prv": "opacus"}
_ACCOUNTANTS = {
    "pld": "privacy loss distributions of dp-accounting",
    "rdp": "Rényi differential privacy of dp-accounting",
    "prv": "privacy random variables of Opacus",
}
_MOST_CLIENTS = 20  # that are listed one by one


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, paragraphs, and rows of a table with headings."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Spending:
    """What a run has spent: the largest `epsilon` over clients, that of each client, the `rounds` that are over, and whether
    the run is `finished`."""

    epsilon: float
    by_client: Mapping[str, float]
    rounds: int
    finished: bool = True


@dataclass(frozen=True)
class Facts:
    """What a statement is made from: the run's configuration and privacy plan as tables, what is `spent` (`None`: nothing was
    trained yet), what is `planned` for each declared count, and lines about other runs on the same data."""

    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    spent: Spending | None = None
    planned: Sequence[Mapping[str, Any]] = ()
    others: Sequence[str] = ()

    def at(self, section: str, key: str, usual: Any = "") -> Any:
        table = self.config.get(section)
        return table.get(key, usual) if isinstance(table, Mapping) else usual

    @property
    def kind(self) -> str:
        """Who is protected, and where the noise is added."""
        return f"{self.plan['level']} at the {self.plan.get('noise_at', 'client')}"


def of_summary(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Facts | None:
    """The facts of a finished private run, from its configuration and summary as tables; `None` for a run without privacy, or
    where its figures cannot be read."""
    try:
        told = summary["privacy"]
        by_client = {str(name): float(epsilon) for name, epsilon in told["epsilon_by_client"].items()}
        facts = Facts(config, told["plan"], Spending(float(summary["epsilon"]), by_client, int(summary["rounds"])))
        sections(facts)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None
    return facts


def sections(facts: Facts) -> list[Section]:
    """The page, part by part."""
    return [
        _guarantee(facts),
        _mechanism(facts),
        _assumed(facts),
        _excluded(facts),
        Section("What leaves a client", headings=("what", "how"), rows=_LEAVES[facts.kind] + _COMMON),
        *_clients(facts),
    ]


def in_words(epsilon: float | None) -> str:
    """An epsilon for a person; `None`: nothing bounds it."""
    return "without bound" if epsilon is None else f"{epsilon:.4g}"


def title(facts: Facts) -> str:
    return f"Privacy statement of the run {facts.at('run', 'name', 'unnamed')}"


def markdown(facts: Facts) -> str:
    """The page as Markdown."""
    parts = [f"# {_escaped(title(facts))}"]
    for section in sections(facts):
        parts += [f"## {section.heading}", *map(_escaped, section.paragraphs)]
        if section.rows:
            lines = [section.headings, ("---",) * len(section.headings), *section.rows]
            parts.append("\n".join(_row(line) for line in lines))
    return "\n\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """A text in one line, in which somebody's names are no markup."""
    plain = printable(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain).replace("&", "&amp;").replace("<", "&lt;")


# --- the parts -----------------------------------------------------------------------------------------------------------

_UNITS = {
    "example": "one training example: one row of a client's data. A person with several rows is several examples",
    "client": "one client: everything that one client has",
    "person": "one person: all rows of a client that name the same person",
}
_NEIGHBOURS = {
    "example at the client": "two data sets of a client of which one has one example more; everything else is the same",
    "person at the client": "two data sets of a client of which one has one person more, with all rows of that person; "
    "everything else is the same",
    "client at the client": "two runs of which one has one client's data, and the other has none in its place",
    "client at the server": "two runs that differ in one client: in one its training changes its uploads, in the other it "
    "uploads what it was sent",
}
_FROM_WHOM = {
    "client at the server": "everybody except the server, which sees uploads without noise and is trusted with them",
}
_HOW = {
    "example at the client": "Each client adds noise to every training step (DP-SGD): each example's gradient is cut to the "
    "clip norm, and noise is added to their sum",
    "person at the client": "Each client adds noise to every training step (DP-SGD): the mean gradient of each person is cut "
    "to the clip norm, and noise is added to their sum",
    "client at the client": "Each client cuts the change that it uploads to the clip norm and adds noise to it",
    "client at the server": "Each client cuts the change that it uploads to the clip norm; the server adds noise to the mean "
    "of a round",
}
_LEAVES = {
    "example at the client": (("trained factors of the adapter, trained head", "with noise from every training step"),),
    "person at the client": (("trained factors of the adapter, trained head", "with noise from every training step"),),
    "client at the client": (("trained factors of the adapter, trained head", "cut, with noise"),),
    "client at the server": (
        ("trained factors of the adapter, trained head", "cut, without noise, to the server only; with noise from there on"),
    ),
}
_COMMON = (
    ("number of examples", "as a declared count, which is taken as public"),
    ("who took part, ranks, names of clients", "as they are; they say nothing of examples"),
    ("scores, norms, spectra", "computed from values that have noise, and from held-out examples"),
    ("training loss, label shares, times and failures of a client", "not at all"),
)


def _guarantee(facts: Facts) -> Section:
    plan, spent = facts.plan, facts.spent
    delta, epsilon = plan["delta"], _epsilon(facts)
    level = str(plan["level"])
    what = "has spent" if spent else "would spend at most"
    state = "" if spent is None or spent.finished else " so far; it is not finished"
    unit = _UNITS.get(level, level).split(":")[0]
    first = (
        f"This run {what} ε = {epsilon:.4g} at δ = {delta:g}{state}. In plain words: take whatever somebody may conclude from "
        f"all that leaves. With {unit} in the data, the probability of that is at most e^ε = {_factor(epsilon)} times what it "
        "is without, plus δ; and the other way round."
    )
    rows = (
        ("what is protected (unit)", _UNITS.get(level, f"one {level}")),
        ("neighbours", _NEIGHBOURS.get(facts.kind, "see the documentation of this level")),
        (
            "protected from",
            _FROM_WHOM.get(facts.kind, "everybody but the client: the server, and whoever gets the model"),
        ),
        ("ε that was asked for", f"{plan['epsilon']:.4g}" if plan["epsilon"] else "none: the noise was given"),
        ("ε " + ("spent" if spent else "planned"), f"{epsilon:.4g}"),
        ("δ", f"{delta:g}"),
        ("rounds", f"{spent.rounds} of {plan['rounds']}" if spent else f"{plan['rounds']}"),
    )
    return Section("What is promised", (first,), ("", "value"), rows)


def _epsilon(facts: Facts) -> float:
    if facts.spent:
        return facts.spent.epsilon
    return max((row["epsilon"] for row in facts.planned), default=float(facts.plan["epsilon"]))


def _factor(epsilon: float) -> str:
    return f"{math.exp(epsilon):.3g}" if epsilon < 700 else "infinity"


def _mechanism(facts: Facts) -> Section:
    plan = facts.plan
    library = _LIBRARIES.get(plan["accountant"], "")
    steps = plan["local_steps"] if plan["level"] != "client" else 1
    sampled = (("sampling", "each step draws each example by itself, with the rate below (Poisson sampling)"),)
    rows = (
        ("clip norm", f"{plan['clip_norm']:g}"),
        ("steps", f"{steps} in each round; a client takes part in at most {plan['max_rounds']} rounds"),
        *(sampled if plan["level"] != "client" else ()),
        ("accountant", f"{_ACCOUNTANTS.get(plan['accountant'], plan['accountant'])}, version {_version(library)}"),
        (
            "random numbers",
            "the system's cryptographic source"
            if plan["secure"]
            else "a secret key of 256 random bits, which is not in the run folder",
        ),
    )
    return Section(
        "How",
        (f"{_HOW.get(facts.kind, 'Noise is added before anything leaves')}. The noise was computed before the first round.",),
        ("", "value"),
        rows + tuple(_noise_row(plan, int(count), noise) for count, noise in plan["noise"].items()),
    )


def _noise_row(plan: Mapping[str, Any], count: int, noise: float) -> tuple[str, str]:
    told = f"standard deviation {noise:.4g} × clip norm"
    bands = plan.get("bands", {}).get(str(count), 1)
    rate = f", sampling rate {bands * plan['batch_size'] / count:.4g}" if plan["level"] != "client" else ""
    groups = f" in one of {bands} groups of steps, whose noise is correlated" if bands > 1 else ""
    units = "persons" if plan["level"] == "person" else "examples"
    return (f"noise of clients that declare {count:,} {units}", told + rate + groups)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "unknown: it is not installed here"


# Demonstrations whose base model was made from the same examples.
_LEARNED = {"digits": ". This does not hold in this demonstration: its base model was made from the same pictures, upright"}


def _assumed(facts: Facts) -> Section:
    partition = facts.at("data", "partition", {})
    kind = partition.get("kind", "") if isinstance(partition, Mapping) else ""
    known = _LEARNED.get(str(facts.at("data", "source")), "")
    rows = [
        ("base model", f"public, and not trained on the clients' data before{known}"),
        ("held-out examples, label names", "public: the scores of rounds are published without noise"),
        ("number of examples", "the declared count of each client is public"),
        ("clients' programs", "each client runs this software unchanged: a client that leaves out the noise is not protected"),
        ("floating point", "the noise is rounded to a grid together with what it covers; that normal numbers themselves are "
         "computed in 64-bit floating point is ignored"),
    ]  # fmt: skip
    if "sites" in facts.config:
        rows.append(("division into clients", "each site has files of its own; no row of one site moves another's"))
    elif kind in DEALT:
        rows.append(
            (
                "division into clients",
                f"the rows of one source were divided by their number and labels (data.partition.kind = '{kind}'), as in a "
                "simulation: with one row more, other rows would be with other clients. What is promised is for each client's "
                "examples as they were divided, not for the source as a whole",
            )
        )
    else:
        rows.append(("division into clients", f"a row's client does not depend on other rows (data.partition.kind = '{kind}')"))
    if facts.kind == "client at the server":
        rows.append(("server", "trusted: it sees uploads without noise, keeps them to itself, and adds the noise"))
    return Section("What is assumed", headings=("", "assumed to be"), rows=tuple(rows))


def _excluded(facts: Facts) -> Section:
    paragraphs = [
        "Other runs on the same data, also those by which settings were chosen, spend privacy of their own. Their sum is in "
        "the ledger of the data set on the machine where they ran (anyrank privacy --spent), not in the figure above.",
        "What is common to many examples is learned: that is the purpose of training, and no privacy of one of them.",
        "Scores of the trained model on a client's own rows, and an audit of the run, are not covered by the figure above.",
        *facts.others,
    ]
    return Section("What is not covered", tuple(paragraphs))


def _clients(facts: Facts) -> list[Section]:
    """What each client has spent, or would, in a table of clients or of declared counts."""
    if facts.spent is None:
        rows = tuple(
            (f"{row['num_examples']:,}", f"{row['clients']:,}", f"{row['steps']:,}", f"{row['epsilon']:.4g}")
            for row in facts.planned
        )
        return [Section("By declared count", (), ("examples", "clients", "steps at most", "ε at most"), rows)] if rows else []
    by_client = facts.spent.by_client
    if len(by_client) <= _MOST_CLIENTS:
        rows = tuple((name, f"{epsilon:.4g}") for name, epsilon in by_client.items())
        return [Section("By client", (), ("client", "ε spent"), rows)] if rows else []
    counted = sorted(Counter(f"{epsilon:.4g}" for epsilon in by_client.values()).items(), key=lambda pair: -float(pair[0]))
    shown = tuple((epsilon, f"{clients:,}") for epsilon, clients in counted[:_MOST_CLIENTS])
    return [Section("By client", (), ("ε spent", "clients"), shown)]

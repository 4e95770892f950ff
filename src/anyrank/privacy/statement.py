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
from decimal import ROUND_CEILING, Context, Decimal
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

    @property
    def units(self) -> str:
        """What a client has a declared count of."""
        return "persons" if self.plan["level"] == "person" else "examples"

    @property
    def sampled(self) -> bool:
        """Whether noise is added to training steps, which draw examples or persons."""
        return self.plan["level"] != "client"

    @property
    def steps(self) -> int:
        """The most steps that a client takes in the whole run; of uploads, at the level of clients."""
        return self.plan["max_rounds"] * (self.plan["local_steps"] if self.sampled else 1)

    @property
    def bands(self) -> Mapping[str, int]:
        """`{declared count: bands}` of correlated noise."""
        return self.plan.get("bands") or {}


def sections(facts: Facts) -> list[Section]:
    """The page, part by part."""
    return [
        _guarantee(facts),
        _mechanism(facts),
        _assumed(facts),
        _excluded(facts),
        Section("What leaves a client", headings=("what", "how"), rows=_LEAVES[facts.kind] + _common(facts)),
        *_clients(facts),
    ]


def in_words(epsilon: float | None) -> str:
    """An epsilon for a person, in four digits and never rounded down; `None`: nothing bounds it.

    >>> in_words(2.5), in_words(0.80001), in_words(1e-5)
    ('2.5', '0.8001', '1e-05')
    """
    return "without bound" if epsilon is None else _up(epsilon, 4)


def _up(value: float, digits: int) -> str:
    """A number in so many significant digits, rounded up."""
    exact = Decimal(repr(float(value)))  # the decimal number that a person gave, not the binary one
    return f"{float(Context(digits, ROUND_CEILING).plus(exact)) if exact.is_finite() else value:.{digits}g}"


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


def _common(facts: Facts) -> tuple[tuple[str, str], ...]:
    return (
        (f"number of {facts.units}", "as a declared count, which is taken as public"),
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
        f"This run {what} ε = {in_words(epsilon)} at δ = {_up(delta, 6)}{state}. In plain words: take whatever somebody may "
        f"conclude from all that leaves. With {unit} in the data, the probability of that is at most e^ε = "
        f"{_factor(epsilon)} times what it is without, plus δ; and the other way round."
    )
    rows = (
        ("what is protected (unit)", _UNITS.get(level, f"one {level}")),
        ("neighbours", _NEIGHBOURS.get(facts.kind, "see the documentation of this level")),
        (
            "protected from",
            _FROM_WHOM.get(facts.kind, "everybody but the client: the server, and whoever gets the model"),
        ),
        ("ε that was asked for", in_words(plan["epsilon"]) if plan["epsilon"] else "none: the noise was given"),
        ("ε " + ("spent" if spent else "planned"), in_words(epsilon)),
        ("δ", _up(delta, 6)),
        ("rounds", f"{spent.rounds} of {plan['rounds']}" if spent else f"{plan['rounds']}"),
    )
    return Section("What is promised", (first,), ("", "value"), rows)


def _epsilon(facts: Facts) -> float:
    if facts.spent:
        return facts.spent.epsilon
    return max((row["epsilon"] for row in facts.planned), default=float(facts.plan["epsilon"]))


def _factor(epsilon: float) -> str:
    return _up(math.exp(epsilon), 3) if epsilon < 700 else "infinity"


def _mechanism(facts: Facts) -> Section:
    plan = facts.plan
    library = _LIBRARIES.get(plan["accountant"], "")
    steps = f"{plan['local_steps'] if facts.sampled else 1} in each round; a client takes part in at most {plan['max_rounds']} "
    rows = (
        ("clip norm", f"{plan['clip_norm']:g}"),
        ("steps", f"{steps}rounds, which are {facts.steps:,} steps"),
        *_sampling(facts),
        ("accountant", f"{_ACCOUNTANTS.get(plan['accountant'], plan['accountant'])}, version {_version(library)}"),
        (
            "random numbers",
            "the system's cryptographic source"
            if plan["secure"]
            else "a secret key of 256 random bits, which is not in the run folder",
        ),
    )
    how = _HOW.get(facts.kind, "Noise is added before anything leaves") + _CORRELATED * any(
        bands > 1 for bands in facts.bands.values()
    )
    return Section(
        "How",
        (f"{how}. The noise was computed before the first round.",),
        ("", "value"),
        rows + tuple(_noise_row(facts, int(count), noise) for count, noise in plan["noise"].items()),
    )


_CORRELATED = ". The noise of a client's steps is correlated (DP-FTRL, banded), so that it partly cancels in their sum"


def _sampling(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Whom a step draws, and how much of a person it uses."""
    level, most = facts.plan["level"], facts.plan.get("examples_per_person", 0)
    if not facts.sampled:
        return ()
    how = f"each step draws each {level} by itself, with the rate below (Poisson sampling)"
    if any(bands > 1 for bands in facts.bands.values()):
        how = (
            f"each {level} belongs to one group, drawn for the whole run; groups take turns, and a step draws only from the "
            f"group whose turn it is: each {level} of it by itself, with the rate below (Poisson sampling)"
        )
    used = f"at most {most:,}, chosen anew in each step that draws the person" if most else "all"
    return (("sampling", how), *([("examples of a drawn person", used)] if level == "person" else []))


def _noise_row(facts: Facts, count: int, noise: float) -> tuple[str, str]:
    from anyrank.privacy import correlated  # it loads NumPy, which a refusal does not need

    plan, bands = facts.plan, facts.bands.get(str(count), 1)
    told = f"standard deviation {noise * correlated.norm(bands):.4g} × clip norm"
    rate = f", sampling rate {bands * plan['batch_size'] / count:.4g}" if facts.sampled else ""
    name = f"noise of clients that declare {count:,} {facts.units}"
    if bands == 1:
        return name, told + rate
    fresh = f"{told} of each step's own part (the accountant's noise multiplier {noise:.4g} times {correlated.norm(bands):.4g})"
    return name, f"{fresh}{rate} in one of {bands} groups, each of which has every {bands}th step"


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
        (f"number of {facts.units}", "the declared count of each client is public"),
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
                f"{facts.units} as they were divided, not for the source as a whole",
            )
        )
    else:
        rows.append(("division into clients", f"a row's client does not depend on other rows (data.partition.kind = '{kind}')"))
    if facts.units == "persons":
        rows.append(
            (
                "a person",
                "all rows of a person are at one client, under one name: for a person at several clients, their ε and δ add up",
            )
        )
    if facts.kind == "client at the server":
        rows.append(("server", "trusted: it sees uploads without noise, keeps them to itself, and adds the noise"))
    return Section("What is assumed", headings=("", "assumed to be"), rows=tuple(rows))


_LEDGER = (
    "That ledger adds runs by the smaller of two bounds: privacy loss distributions, and Rényi differential privacy (both of "
    "dp-accounting)"
)
_ADDED = {"pld": f"{_LEDGER}."}
_OTHER = f"{_LEDGER}. The figure above is of another accountant, so that the ledger's figure for this run alone may differ."


def _excluded(facts: Facts) -> Section:
    paragraphs = [
        "Other runs on the same data, also those by which settings were chosen, spend privacy of their own. Their sum is in "
        "the ledger of the data set on the machine where they ran (anyrank privacy --spent), not in the figure above. "
        + _ADDED.get(facts.plan["accountant"], _OTHER),
        "What is common to many examples is learned: that is the purpose of training, and no privacy of one of them.",
        "Scores of the trained model on a client's own rows, and an audit of the run, are not covered by the figure above.",
        *(["Persons who are held out for scores are not protected."] if facts.units == "persons" else []),
        *facts.others,
    ]
    return Section("What is not covered", tuple(paragraphs))


def _clients(facts: Facts) -> list[Section]:
    """What each client has spent, or would, in a table of clients or of declared counts."""
    if facts.spent is None:
        return _planned(facts)
    by_client = facts.spent.by_client
    if len(by_client) <= _MOST_CLIENTS:
        rows = tuple((name, in_words(epsilon)) for name, epsilon in by_client.items())
        return [Section("By client", (), ("client", "ε spent"), rows)] if rows else []
    counted = sorted(Counter(map(in_words, by_client.values())).items(), key=lambda pair: -float(pair[0]))
    shown = tuple((epsilon, f"{clients:,}") for epsilon, clients in counted[:_MOST_CLIENTS])
    return [Section("By client", (), ("ε spent", "clients"), shown)]


def _planned(facts: Facts) -> list[Section]:
    """One row for each declared count; with correlated noise, an example is drawn in some of the steps only."""
    drawn = (f"draws of one {facts.plan['level']} at most",) if facts.bands else ()
    rows = tuple(
        (
            *(f"{row['num_examples']:,}", f"{row['clients']:,}", f"{facts.steps:,}"),
            *(f"{row['steps']:,}" for _ in drawn),
            in_words(row["epsilon"]),
        )
        for row in facts.planned
    )
    headings = (facts.units, "clients", "steps at most", *drawn, "ε at most")
    return [Section("By declared count", (), headings, rows)] if rows else []

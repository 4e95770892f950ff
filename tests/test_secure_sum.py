"""`privacy.secure_sum`: which methods need no more than sums, and that asking for it is refused rather than ignored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anyrank import methods, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.config.tables import from_table
from anyrank.deployment.public import check
from anyrank.errors import ConfigError
from anyrank.messages.records import ClientUpdate, ServerState
from anyrank.methods import REGISTRY, Holds
from conformance.world import FULL, MIXED, Case, World, after_rounds, updates_of

ROOT = Path(__file__).resolve().parents[1]
SUMS = ("fedsa", "fedsvd", "ffa_lora", "rbla", "rolora", "zeropad")  # the methods that docs/secure-summation.md names
NOT_SUMS = sorted(name for name, kind in REGISTRY.items() if kind.traits.linear is Holds.NEVER and name not in SUMS)


# --- what a server of sums would have to know ------------------------------------------------------------------------


def traded(updates: Sequence[ClientUpdate], train: frozenset[str]) -> list[ClientUpdate]:
    """Updates whose first two senders have traded some of their training: n1 d goes from one to n2 d of the other, on slices
    that both have, so that every weighted sum over the owners of a slice stays what it was."""
    (one, two), draw = updates[:2], torch.Generator().manual_seed(3)
    changed: list[dict] = [{}, {}]
    for name in one.adapter.layers:
        layers = [update.adapter.layers[name] for update in (one, two)]
        rank = min(layer.rank for layer in layers)
        moved = {factor: torch.randn(getattr(layers[0], factor).shape, generator=draw).double() for factor in ("A", "B")}
        for place, (layer, sign, update) in enumerate(zip(layers, (1, -1), (one, two), strict=True)):
            A, B = layer.A.clone(), layer.B.clone()
            # factors are summed as sqrt(s) A, sqrt(s) B, or as A and s B: constant scalings make these the same trade
            A[:rank] += sign * moved["A"][:rank] / update.num_examples * ("A" in train)
            B[:, :rank] += sign * moved["B"][:, :rank] / update.num_examples * ("B" in train)
            changed[place][name] = layer.with_factors(A, B)
    pair = [replace(u, adapter=replace(u.adapter, layers=new)) for u, new in zip((one, two), changed, strict=True)]
    return [*pair, *updates[2:]]


def after(name: str) -> tuple[ServerState, list[ClientUpdate], methods.Method]:
    case, method = Case(World(MIXED, "constant"), FULL), methods.make(name)
    if not method.traits.mixed_ranks:
        case = Case(World((4, 4, 4, 4), "constant"), FULL)
    state = after_rounds(method, case.world, 2)
    return state, updates_of(method, state, case.drawn()), method


def apart(one: Adapter, two: Adapter, factors: Sequence[str]) -> float:
    pairs = [(getattr(one.layers[n], f), getattr(two.layers[n], f)) for n in one.layers for f in factors]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", SUMS)
def test_the_new_state_of_these_methods_follows_from_sums_over_the_owners_of_a_slice(name: str) -> None:
    """Other uploads with the same sums give the same state: this is what makes secure summation possible at all."""
    state, updates, method = after(name)
    other = traded(updates, method.dispatch(state, case_client(updates)).train)
    assert apart(updates[0].adapter, other[0].adapter, "AB") > 0.1  # the uploads themselves differ
    results = [method.aggregate(state, each).adapter for each in (updates, other)]
    assert apart(*results, "AB") < 1e-12


@pytest.mark.parametrize("name", NOT_SUMS)
def test_the_new_state_of_the_other_methods_does_not(name: str) -> None:
    state, updates, method = after(name)
    results = [method.aggregate(state, each) for each in (updates, traded(updates, frozenset("AB")))]
    distance = apart(results[0].adapter, results[1].adapter, "AB")
    if results[0].merged:
        distance = max(distance, apart(results[0].merged, results[1].merged, "AB")) if same_ranks(results) else 1.0
    assert distance > 1e-3


def case_client(updates: Sequence[ClientUpdate]):
    from anyrank.messages.records import Client

    return Client(updates[0].client, max(layer.rank for layer in updates[0].adapter.layers.values()))


def same_ranks(results: Sequence[ServerState]) -> bool:
    return results[0].merged.ranks == results[1].merged.ranks


def test_a_sum_of_one_is_that_clients_upload() -> None:
    """Ranks 2, 3, 5, 5, 8: only the last client has slices 6 to 8. What the server makes of them is what that client sent, so
    that a sum over them must never be shown."""
    state, updates, method = after("rbla")
    new = method.aggregate(state, updates).adapter
    for name, layer in new.layers.items():
        lone = slice(sorted(u.adapter.layers[name].rank for u in updates)[-2], layer.rank)
        assert lone.start < lone.stop
        assert torch.allclose(layer.A[lone], updates[-1].adapter.layers[name].A[lone], rtol=0, atol=1e-12)


# --- the refusal -----------------------------------------------------------------------------------------------------


def asked(name: str, ranks: Sequence[int] = (4,)) -> Config:
    return Config().replace(
        model={"name": "digits-mlp"}, method={"name": name}, clients={"ranks": tuple(ranks)}, privacy={"secure_sum": True}
    )


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_it_is_refused_for_each_method_by_name_with_the_reason(name: str, monkeypatch, cache) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    with pytest.raises(ConfigError) as caught:
        simulation.build(asked(name)).close()
    text = str(caught.value)
    assert text.startswith("privacy.secure_sum: ")
    assert "\n" not in text
    assert f" {name}'s " in text or f" {name} " in text
    reason = "has to see each upload" if name in NOT_SUMS else "no library that was tried"
    assert reason in text
    page = text[text.index("docs/") : text.index(".md") + 3]
    assert (ROOT / page).is_file()


@pytest.mark.parametrize("level", [{}, {"level": "example", "epsilon": 8.0, "delta": 1e-4}])
def test_noise_does_not_make_it_accepted(level: dict, monkeypatch, cache) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    with pytest.raises(ConfigError, match=r"privacy\.secure_sum: "):
        simulation.build(asked("rbla").replace(privacy={"secure_sum": True, **level})).close()


def test_a_server_over_sites_refuses_it() -> None:
    sites = [{"name": name, "rank": 4, "source": f"{name}.csv"} for name in ("one", "two")]
    table: dict = {"sites": sites, "eval": {"where": "sites"}}
    table |= {"model": {"name": "base", "task": "text-classification"}, "data": {"label_names": ["a", "b"]}}
    for name, reason in (("raflora", "has to see each upload"), ("rbla", "no library")):
        config = from_table(table | {"method": {"name": name}, "privacy": {"secure_sum": True}})
        with pytest.raises(ConfigError, match=reason):
            check(config, methods.make(name))
        check(config.replace(privacy={"secure_sum": False}), methods.make(name))


OWN = """
from dataclasses import dataclass
from anyrank.methods import register
from anyrank.methods.rbla import RBLA

@register
@dataclass(frozen=True)
class Mine(RBLA):
    name = "mine_in_sums"
"""


def test_a_method_of_ones_own_is_refused_too(tmp_path: Path, monkeypatch, cache) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    (tmp_path / "mine.py").write_text(OWN)
    config = asked("mine_in_sums").replace(method={"name": "mine_in_sums", "file": str(tmp_path / "mine.py")})
    try:
        with pytest.raises(ConfigError, match="sums are all that mine_in_sums needs"):
            simulation.build(config).close()
    finally:
        REGISTRY.pop("mine_in_sums", None)


@pytest.mark.parametrize(("name", "reason"), [("raflora", "has to see each upload"), ("rbla", "no library that was tried")])
def test_the_command_refuses_it_in_one_line_before_it_loads_torch(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(f'[method]\nname = "{name}"\n[privacy]\nsecure_sum = true\n')
    program = "import sys; sys.modules['torch'] = None; from anyrank.cli import main; main()"
    for verb in ("run", "plan"):
        command = [sys.executable, "-c", program, verb, "small.toml"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("anyrank: privacy.secure_sum: ")
        assert done.stderr.count("\n") == 1
        assert reason in done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["small.toml"]

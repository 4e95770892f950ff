"""`rank = "auto"`: the largest rank that a site's memory affords, measured once before the run, and a number from then on."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import pytest

from anyrank import devices, simulation
from anyrank.cli.plans import plan_tables
from anyrank.config.sections import Config
from anyrank.config.tables import from_table, identity, to_table
from anyrank.errors import ConfigError, RunError
from anyrank.simulation import ranks
from anyrank.simulation.building import build, settled
from anyrank.studies import forecast

pytest.importorskip("transformers")
from test_sites import site, table
from tiny import make_model

CANDIDATES = (4, 8, 16, 32)  # the model's matrices are 32 x 32, so that 64 is no rank of it


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch, cache):
    monkeypatch.setattr(devices, "cores", lambda: 1)
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    make_model(root / "model")
    for name in ("county", "lakeside"):
        site(root, name)
    return root


def config(folder: Path, rank, memory_gb: float = 0.0, **sections) -> Config:
    """Two sites: county with this rank and memory, lakeside of rank 4."""
    own = {"rank": rank} | ({"memory_gb": memory_gb} if memory_gb else {})
    files = {"source": str(folder / "county.csv"), "test_source": str(folder / "county-test.csv")}
    listed = [{"name": "county", **files, **own}, {"name": "lakeside", "rank": 4, "source": str(folder / "lakeside.csv")}]
    return from_table(table(folder, listed, run={"name": "ranks", "rounds": 1}) | sections)


def rank_of(chosen: Config) -> int:
    return next(each.rank for each in chosen.sites if each.name == "county")


@functools.cache
def needs(folder: Path, rank: int) -> float:
    """The GB below which the rank is refused, to a millionth, found from outside by halving."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        try:
            settled(config(folder, rank, middle))
            high = middle
        except ConfigError:
            low = middle
    return high


def test_auto_is_the_largest_rank_that_is_accepted_as_a_number(folder) -> None:
    needed = {rank: needs(folder, rank) for rank in CANDIDATES}
    assert sorted(needed, key=needed.get) == list(CANDIDATES)  # a larger rank needs more
    for rank, gb in needed.items():
        assert rank_of(settled(config(folder, "auto", gb + 1e-6))) == rank
    # 3 layers x (query, value) of 32 x 32 at rank 32: 6 x (32 x 32 + 32 x 32) x 4 bytes = 49,152 bytes an adapter. From 4 to
    # 32, six copies (four, and two moments of AdamW) of 7/8 of it are added at least, beside the larger activations.
    assert needed[32] - needed[4] >= 6 * 49_152 * 7 / 8 / 1e9


def test_a_rank_above_memory_is_one_line_that_says_what_fits(folder) -> None:
    between = (needs(folder, 8) + needs(folder, 16)) / 2
    with pytest.raises(ConfigError) as error:
        settled(config(folder, 16, between))
    told = str(error.value)
    assert told.startswith("sites.county.rank = 16: needs 0.00")
    assert told.endswith("(memory_gb); at most rank 8 fits; lower it, or use 'auto'")
    assert "\n" not in told
    with pytest.raises(ConfigError, match=r"^sites.county.rank = 'auto': no rank fits: the smallest needs .* train.batch_size"):
        settled(config(folder, "auto", 1e-6))


def test_candidates_are_those_of_the_clients_and_end_at_the_models_width(folder) -> None:
    told: list[str] = []
    assert rank_of(settled(config(folder, "auto", 8.0), tell=told.append)) == 32
    assert told == ["site county: rank 32, the largest of 4, 8, 16, 32 that fits in 8.0 GB"]
    assert rank_of(settled(config(folder, "auto", 8.0, clients={"ranks": [2, 6]}))) == 6
    assert rank_of(settled(config(folder, "auto", 8.0, clients={"ranks": [40, 50]}))) == 32  # none of them: the most there is
    assert rank_of(settled(config(folder, "auto"))) == 32  # by what is free here


def test_a_plan_says_which_ranks_were_chosen(folder) -> None:
    figures = forecast.cost(config(folder, "auto", 8.0), measure=False)
    assert figures["chosen_ranks"] == ["site county: rank 32, the largest of 4, 8, 16, 32 that fits in 8.0 GB"]
    rows = [row for table in plan_tables(figures) for row in table.columns[0].cells]
    assert "chosen ranks" in rows
    assert not forecast.cost(config(folder, 4), measure=False)["chosen_ranks"]


def test_free_memory_counts_and_what_is_not_known_has_to_be_given(folder, monkeypatch) -> None:
    monkeypatch.setattr(ranks, "free_memory", lambda device: 100)
    with pytest.raises(ConfigError, match="no rank fits"):
        settled(config(folder, "auto"))
    monkeypatch.setattr(ranks, "free_memory", lambda device: None)
    with pytest.raises(ConfigError, match="does not say how much memory is free; give memory_gb"):
        settled(config(folder, "auto"))


def test_the_run_has_the_number_and_continues_with_it(folder, tmp_path, monkeypatch) -> None:
    simulation.execute(config(folder, "auto", needs(folder, 8) + 1e-6), tmp_path / "run")
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert [each["rank"] for each in stored["sites"]] == [8, 4]
    monkeypatch.setattr(ranks, "settle", lambda *_: pytest.fail("measured again"))
    again = config(folder, "auto", needs_of(stored), run={"name": "ranks", "rounds": 2})
    assert simulation.execute(again, tmp_path / "run", resume=True)["rounds"] == 2
    with pytest.raises(RunError, match="contains a run already"):
        simulation.execute(again, tmp_path / "run")


def needs_of(stored: dict) -> float:
    return stored["sites"][0]["memory_gb"]


def test_the_number_gives_the_same_bytes_as_the_run_that_measured_it(folder, tmp_path) -> None:
    gb = needs(folder, 8) + 1e-6
    simulation.execute(config(folder, "auto", gb), tmp_path / "auto")
    simulation.execute(from_table(tomllib.loads((tmp_path / "auto/config.toml").read_text())), tmp_path / "number")
    for file in ("adapter/adapter_model.safetensors", "sites/county/adapter/adapter_model.safetensors", "config.toml"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("auto", "number"))
        assert one == other


def test_nothing_is_measured_where_nobody_asks_for_it(folder, monkeypatch) -> None:
    monkeypatch.setattr(ranks, "settle", lambda *_: pytest.fail("measured"))
    plain = config(folder, 8)
    assert settled(plain) is plain
    assert "memory_gb" not in str(identity(plain))  # as runs of earlier versions have it


def test_a_plan_measures_too_and_other_commands_want_a_number(folder) -> None:
    figures = forecast.cost(config(folder, "auto", 8.0), measure=False)
    assert [level["rank"] for level in figures["levels"]] == [4, 32]
    with pytest.raises(ConfigError, match=r"^sites.county.rank: 'auto' is measured by anyrank run and anyrank plan"):
        build(config(folder, "auto"))


@pytest.mark.parametrize("clients", [{}, {"clients": {"ranks": [2, 6]}}])
def test_a_configuration_with_auto_is_written_and_read(folder, clients) -> None:
    given = config(folder, "auto", 2.5, **clients)
    assert from_table(to_table(given)) == given
    assert given.clients.ranks == tuple(clients.get("clients", {}).get("ranks", (4, 8, 16, 32, 64)))
    assert given.with_ranks({"county": 16}).clients.ranks == (16, 4)
    assert given.at_rank(2).clients.ranks == (2, 2)

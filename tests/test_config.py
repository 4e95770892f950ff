"""Configurations: what is written is what is read, and what is wrong is said in one line that tells the cure."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
import tomli_w

from anyrank.config.sections import Config
from anyrank.config.tables import from_table, load, to_table
from anyrank.errors import ConfigError


def test_a_resolved_configuration_reads_back_the_same() -> None:
    config = Config().replace(
        run={"name": "x", "seed": 3},
        clients={"ranks": (1, 2), "participation": 0.5},
        method={"name": "rbla", "options": {"empty_slice": "zero"}},
    )
    assert from_table(tomllib.loads(tomli_w.dumps(to_table(config)))) == config


def test_options_of_the_method_stand_beside_its_name() -> None:
    config = from_table({"method": {"name": "raflora", "split": "balanced"}})
    assert config.method.options == {"split": "balanced"}
    assert to_table(config)["method"] == {"name": "raflora", "file": "", "split": "balanced"}


def test_whole_numbers_do_for_numbers_and_nothing_else_changes_type() -> None:
    assert from_table({"train": {"learning_rate": 1}}).train.learning_rate == 1.0
    with pytest.raises(ConfigError, match="clients.count: expected whole number, got True"):
        from_table({"clients": {"count": True}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"trian": {}}, r"\[trian\]: unknown section; did you mean 'train'\?"),
        ({"train": {"learnin_rate": 1.0}}, r"train.learnin_rate: unknown key; did you mean 'learning_rate'\?"),
        ({"data": {"partition": {"alhpa": 1.0}}}, r"data.partition.alhpa: unknown key; did you mean 'alpha'\?"),
        ({"data": {"partition": {"kind": "dirichlt"}}}, r"data.partition.kind: .* did you mean 'dirichlet'\?"),
        ({"data": {"partition": {"column": "site"}}}, r"data.partition.column: expected a column with kind = 'column'"),
        ({"data": {"partition": {"alpha": 0.0}}}, r"alpha: expected a number above 0, got 0.0"),
        ({"clients": {"ranks": []}}, r"clients.ranks: expected at least one rank"),
        ({"clients": {"ranks": [4, 0]}}, r"clients.ranks: expected ranks of at least 1, got 0"),
        ({"clients": {"ranks": 4}}, r"clients.ranks: expected a list, got 4"),
        ({"clients": {"participation": 0}}, r"clients.participation: expected a share above 0, at most 1"),
        ({"clients": {"participation": 1.5}}, r"clients.participation"),
        ({"train": {"local_steps": 3, "local_epochs": 1}}, r"local_steps or local_epochs, not both"),
        ({"train": {"momentum": 0.9}}, r"train.momentum: is for optimizer = 'sgd'"),
        ({"train": {"learning_rate": "fast"}}, r"train.learning_rate: expected number, got 'fast'"),
        ({"run": {"rounds": 0}}, r"run.rounds: expected a whole number of at least 1, got 0"),
        ({"run": {"name": "a/b"}}, r"run.name"),
        ({"model": {"name": "a", "path": "b"}}, r"either name or path"),
        (
            {"privacy": {"epsilon": 3}},
            r"privacy.epsilon: expected level = 'example', 'person' or 'client' to be set too, got 3.0",
        ),
        ({"track": {}}, r"\[track\]"),
        ({"run": 3}, r"run: expected a table of keys, got 3"),
    ],
)
def test_what_is_wrong_is_said_with_its_cure(table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        from_table(table)
    assert "\n" not in str(error.value)


def test_overrides_take_toml_values_and_bare_words(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[run]\nrounds = 3\n")
    config = load(
        file,
        ["run.rounds=5", "method.name=rbla", "clients.ranks=[1, 2]", "data.partition.kind=iid", "train.learning_rate=1e-3"],
    )
    assert (config.run.rounds, config.method.name, config.clients.ranks) == (5, "rbla", (1, 2))
    assert (config.data.partition.kind, config.train.learning_rate) == ("iid", 1e-3)


@pytest.mark.parametrize("override", ["rounds", "rounds=3", "=3", "run..x=3"])
def test_an_override_that_is_none_says_what_one_is(tmp_path: Path, override: str) -> None:
    (tmp_path / "c.toml").write_text("[run]\nrounds = 1\n")
    with pytest.raises(ConfigError, match=r"expected section.key=value"):
        load(tmp_path / "c.toml", [override])


def test_relative_paths_are_taken_from_the_configs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.csv").write_text("text,label\n")
    (tmp_path / "here" / "c.toml").write_text('[data]\nsource = "train.csv"\n')
    monkeypatch.chdir(tmp_path)
    assert load("here/c.toml").data.source == str((tmp_path / "here" / "train.csv").resolve())


def test_a_file_that_is_no_toml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("run = [")
    with pytest.raises(ConfigError, match="not readable as TOML"):
        load(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.toml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_configuration_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match=r"pipe.toml: not readable as TOML: .*expected a file, got a pipe"):
        load(tmp_path / "pipe.toml")


@pytest.mark.parametrize("text", ["x = " + "[" * 50_000, "#" * (1 << 20) + "#"])
def test_a_configuration_of_no_end_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "long.toml").write_text(text)
    with pytest.raises(ConfigError, match="long.toml: not readable as TOML") as error:
        load(tmp_path / "long.toml")
    assert "\n" not in str(error.value)


def test_a_mark_of_utf_8_in_front_changes_nothing(tmp_path: Path) -> None:
    text = "[run]\r\nrounds = 7\r\n"
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(tmp_path / "marked.toml") == Config().replace(run={"rounds": 7})

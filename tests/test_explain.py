"""Every key of a configuration says what it is, and is found by what other libraries call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyrank.config import explain, reference, tables
from anyrank.config.sections import Config, SiteConfig
from anyrank.errors import ConfigError
from anyrank.methods import catalog

ROOT = Path(__file__).resolve().parents[1]
KEYS = explain.keys()


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_every_key_says_what_it_is(key: explain.Key) -> None:
    assert key.doc.endswith(".")
    assert key.doc[0].isupper()
    assert len(key.doc.split()) >= 4
    assert key.type != "table" or key.path == "method.options"


def test_every_key_of_a_configuration_is_one_of_them() -> None:
    """What is read from a file is what is explained, no more and no less."""

    def paths(table: dict, where: str = "") -> set[str]:
        inner = {name: value for name, value in table.items() if isinstance(value, dict)}
        own = {f"{where}{name}" for name in table.keys() - inner.keys()}
        return own.union(*(paths(value, f"{where}{name}.") for name, value in inner.items()))

    unwritten = {"method.options", "model.handed_in", "data.partition.handed_in", "method.handed_in"}
    site = SiteConfig("st-mary", 8, "st-mary.csv", "held-out.csv", memory_gb=1.0)
    of_sites = {f"sites.{name}" for name in tables.to_table(Config(sites=(site,)))["sites"][0]}
    assert {key.path for key in KEYS} - unwritten == paths(tables.to_table(Config())) | of_sites


@pytest.mark.parametrize("key", [key for key in KEYS if isinstance(key.values, tuple)], ids=lambda key: key.path)
def test_the_values_that_are_told_are_the_ones_that_are_taken(key: explain.Key) -> None:
    assert key.default in key.values
    *sections, name = key.path.split(".")
    table = {name: "no such value"}
    if sections[0] == "privacy" and name != "level":
        table |= {"level": "client", "epsilon": 1.0, "delta": 1e-5}
    for section in reversed(sections):
        table = {section: table}
    with pytest.raises(ConfigError) as error:
        tables.from_table(table)
    assert f"{key.path}: expected one of {', '.join(key.values)}, got 'no such value'" in str(error.value)


@pytest.mark.parametrize(
    ("word", "paths"),
    [
        ("lora.alpha", ["lora.alpha"]),
        ("alpha", ["data.partition.alpha", "lora.alpha"]),
        ("lora", ["lora.alpha", "lora.scaling", "lora.target_modules"]),
        ("lora_alpha", ["lora.alpha"]),
        ("r", ["clients.ranks"]),
        ("lr", ["train.learning_rate"]),
        ("num_rounds", ["run.rounds"]),
        ("num-server-rounds", ["run.rounds"]),
        ("num_server_rounds", ["run.rounds"]),
        ("fraction_fit", ["clients.participation"]),
        ("epochs", ["train.local_epochs"]),
        ("target_epsilon", ["privacy.epsilon"]),
    ],
)
def test_a_key_is_found_by_what_somebody_calls_it(word: str, paths: list[str]) -> None:
    assert [key.path for key in explain.find(word)] == paths


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("alhpa", "alhpa: no key or section has this name; did you mean 'alpha'?"),
        ("lora_alhpa", "did you mean 'lora_alpha'?"),
        ("train.lr", "did you mean train.learning_rate?"),
        ("run.alpha", "did you mean data.partition.alpha or lora.alpha?"),
        ("zzz", "known sections: run, model, data, "),
    ],
)
def test_a_word_that_is_no_key_is_answered_by_the_nearest(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        explain.find(word)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"train": {"lr": 1}}, "train.lr: unknown key; did you mean train.learning_rate?"),
        ({"lora": {"r": 8}}, "lora.r: unknown key; did you mean clients.ranks?"),
        ({"lora": {"lora_alpha": 8}}, "lora.lora_alpha: unknown key; did you mean lora.alpha?"),
        ({"run": {"num_rounds": 8}}, "run.num_rounds: unknown key; did you mean run.rounds?"),
        ({"run": {"learning_rate": 1}}, "run.learning_rate: unknown key; did you mean train.learning_rate?"),
        ({"lora": {"batch_size": 1}}, "lora.batch_size: unknown key; did you mean train.batch_size or eval.batch_size?"),
        ({"learning_rate": 1}, "[learning_rate]: unknown section; did you mean train.learning_rate?"),
        ({"train": {"learnin_rate": 1}}, "train.learnin_rate: unknown key; did you mean 'learning_rate'?"),
    ],
)
def test_a_key_in_the_wrong_place_or_of_another_library_is_told_its_own(table: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tables.from_table(table)
    assert str(error.value) == message


def test_another_librarys_name_is_no_key_here() -> None:
    """Else the search by a key's own name would hide it, and an error would send somebody to another key."""
    others = {name for key in KEYS for names in key.also.values() for name in names}
    assert not others & {key.name for key in KEYS}


def test_every_option_of_a_method_is_explained() -> None:
    told = {
        (user, key.name)
        for key in catalog.option_keys()
        for user in key.doc.split(";")[0].removeprefix("An option of ").split(", ")
    }
    assert told == {(entry["name"], option) for entry in catalog.stored() for option in entry["options"]}
    assert [key.default for key in explain.find("penalty", catalog.option_keys())] == [0.001, 0.01]  # of two methods


def test_the_page_of_keys_is_made_from_the_code() -> None:
    """Write it anew by `python -m anyrank.config.reference > docs/configuration.md`."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.page()


def test_explain_prints_it_for_people_and_for_machines(anyrank) -> None:
    told = anyrank("explain", "lora.alpha").stdout
    for word in ("lora.alpha", "number", "a number above 0", "2.0", "PEFT: lora_alpha", "scaling s(r)"):
        assert word in told
    assert "[2, 4, 8, 16, 32]" in anyrank("explain", "r").stdout
    (key,) = json.loads(anyrank("explain", "lora_alpha", "--json").stdout)["keys"]
    assert (key["key"], key["default"], key["also"]) == ("lora.alpha", 2.0, {"PEFT": ["lora_alpha"]})
    assert json.loads(anyrank("explain", "train.schedule", "--json").stdout)["keys"][0]["values"] == [
        "constant",
        "linear",
        "cosine",
    ]
    assert "[data.partition]" in anyrank("explain").stdout
    assert "data.partition" in json.loads(anyrank("explain", "--json").stdout)["sections"]
    options = json.loads(anyrank("explain", "split", "--json").stdout)["keys"]
    assert [key["key"] for key in options] == ["data.split", "method.split"]
    assert (options[1]["default"], options[1]["values"]) == ("singular-in-b", ["singular-in-b", "balanced"])
    assert "raflora" in options[1]["doc"]
    refused = anyrank("explain", "zzz")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1

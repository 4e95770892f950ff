"""Doors that strangers come to: whatever is handed in, it is done, or refused in one line, soon, and never half."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from anyrank import Adapter, ClientUpdate, LoraLayer, aggregate, files
from anyrank.adapter.patterns import Patterns
from anyrank.adapter.stored import open_adapter
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.cli import arguments, console, main
from anyrank.errors import AdapterError, AnyRankError, ConfigError, RunError, printable
from anyrank.federation import loop
from anyrank.federation.guard import admit
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate as Update
from anyrank.messages.records import Code, Download, Failure, Job
from anyrank.report.build import build as build_report
from anyrank.report.build import check_out
from hostile import (
    CONFIG,
    GOOD_CONFIG,
    GOOD_WEIGHTS,
    NAMES,
    PREFIX,
    WEIGHTS,
    Breaks,
    Liar,
    forced,
    hostile_reply,
    odd_tensors,
    safetensors,
    spoiled_folder,
    words,
    write_folder,
)  # fmt: skip
from test_federation import Script, build, rows

SOON = 2.0  # seconds of this process


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < 10 * SOON  # of all of a test's cases together; each of them is held to SOON


def refused(act: Callable[[], Any], kind: type[AnyRankError] = AnyRankError) -> str:
    """The one line by which `act` is refused, soon."""
    began = time.process_time()
    with pytest.raises(kind) as error:
        act()
    assert time.process_time() - began < SOON
    told = str(error.value)
    assert told == printable(told)
    assert 0 < len(told) < 3000
    return told


def done_or_refused(act: Callable[[], Any]) -> Any:
    """What `act` gives, or `None` where it is refused in one line; soon in either case."""
    began, told = time.process_time(), ""
    try:
        return act()
    except AnyRankError as error:
        told = str(error)
        assert told == printable(told)
        return None
    finally:
        assert time.process_time() - began < SOON, told


# --- adapter folders -------------------------------------------------------------------------------------------------

GOOD = {PREFIX + key: entry for key, entry in GOOD_WEIGHTS.items()}
A0, B0 = f"{PREFIX}layers.0.q.lora_A.weight", f"{PREFIX}layers.0.q.lora_B.weight"


def both(folder: Path) -> str:
    """The line by which both ways to read a folder refuse it."""
    one, two = refused(lambda: Adapter.load(folder), AdapterError), refused(lambda: open_adapter(folder), AdapterError)
    assert one == two
    return one


CONFIGS = {
    "nested": (b'{"a":' * 100_000, "more than 32"),
    "nested lists": (json.dumps(GOOD_CONFIG)[:-1].encode() + b', "x": ' + b"[" * 40 + b"]" * 40 + b"}", "more than 32"),
    "twice": (b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "r": 3}', "key 'r' stands twice"),
    "infinite dropout": (
        json.dumps(GOOD_CONFIG | {"lora_dropout": math.inf}).encode(),
        "lora_dropout: expected a finite number",
    ),
    "infinite within": (json.dumps(GOOD_CONFIG | {"x": [{"y": math.nan}]}).encode(), "x: expected a finite number"),
    "1e400": (json.dumps(GOOD_CONFIG)[:-1].encode() + b', "lora_dropout": 1e400}', "lora_dropout: expected a finite number"),
    "alpha 1e400": (
        json.dumps(GOOD_CONFIG)[:-1].encode().replace(b"4", b"1e400", 1) + b"}",
        "expected a positive number, got inf",
    ),
    "digits": (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    "alpha bool": (GOOD_CONFIG | {"lora_alpha": True}, "lora_alpha: expected a number"),
    "alpha text": (GOOD_CONFIG | {"lora_alpha": "16"}, "lora_alpha: expected a number"),
    "alpha 10^400": (GOOD_CONFIG | {"lora_alpha": 10**400}, "more than 300 digits"),
    "r 0": (GOOD_CONFIG | {"r": 0}, "r: expected a whole number of at least 1"),
    "r negative": (GOOD_CONFIG | {"r": -2}, "r: expected a whole number"),
    "r float": (GOOD_CONFIG | {"r": 2.0}, "r: expected a whole number"),
    "r bool": (GOOD_CONFIG | {"r": True}, "r: expected a whole number"),
    "r huge": (GOOD_CONFIG | {"r": 10**400}, "says rank 10^9 or more"),
    "type": (GOOD_CONFIG | {"peft_type": "x" * 100_000}, "expected peft_type 'LORA'"),
    "spaces": (b" " * (17 << 20), "expected at most 16,777,216 bytes"),
    "repetition": (GOOD_CONFIG | {"rank_pattern": {"q{1,99999999999}": 2}}, "the repetition number is too large"),
    "nested groups": (GOOD_CONFIG | {"alpha_pattern": {"(" * 3000 + ")" * 3000: 2}}, "alpha_pattern: expected regular expr"),
    "long pattern": (GOOD_CONFIG | {"rank_pattern": {"q" * 1_000_000: 2}}, "longer than 10,000 characters"),
    "reference": (GOOD_CONFIG | {"rank_pattern": {r"(.)\1": 2, r"(q)\1?": 2}}, "cannot be matched in a bounded time"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_none_is_one_line(case: str, tmp_path: Path) -> None:
    config, says = CONFIGS[case]
    assert says in both(write_folder(tmp_path / "ada", config))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
@pytest.mark.parametrize("spoil", [pipe, to_device, to_folder])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file_is_not_waited_for(spoil: Callable, name: str, tmp_path: Path) -> None:
    spoil(write_folder(tmp_path / "ada") / name)
    assert "file" in both(tmp_path / "ada")


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
OVERLAP = HEADER[:-1] + b', "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
FILES = {
    "header longer than the file": struct.pack("<Q", 1 << 62) + HEADER,
    "header without its end": struct.pack("<Q", 10**6) + HEADER,
    "overlapping": struct.pack("<Q", len(OVERLAP)) + OVERLAP + b"\0" * 4,
    "not JSON": struct.pack("<Q", 8) + b"nonsense",
    "nested": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "no tensors": struct.pack("<Q", 2) + b"{}",
    "huge shape": safetensors(GOOD).replace(b'"shape": [2, 6]', b'"shape": [4294967296, 4294967296]'),
}


@pytest.mark.parametrize("case", FILES)
def test_weights_that_are_none_are_one_line(case: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "ada", weights=FILES[case])
    for read in (Adapter.load, open_adapter):  # (which of two tensors safetensors names is chance)
        assert str(folder) in refused(lambda read=read: read(folder), AdapterError)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U16", "U32", "U64"])
def test_numbers_that_are_not_read_are_named(dtype: str, tmp_path: Path) -> None:
    told = both(write_folder(tmp_path / "ada", weights=safetensors(GOOD | {A0: (dtype, (2, 6))})))
    assert f"{dtype} numbers are not read; save it as float32" in told or "not a readable safetensors file" in told


SHAPES = {
    "scalars": ({A0: (), B0: ()}, "A: expected a two-dimensional floating tensor"),
    "one dimension": ({A0: (2,)}, "A: expected a two-dimensional"),
    "Conv1d": ({A0: (2, 6, 3), B0: (5, 2, 1)}, "as those of a Conv1d layer"),
    "Conv3d": ({A0: (2, 6, 1, 1, 1), B0: (5, 2, 1, 1, 1)}, "as those of a Conv3d layer"),
    "left by ZeRO-3": ({A0: (0,), B0: (0,)}, "gather the shards before saving"),
    "a head left by ZeRO-3": ({f"{PREFIX}score.weight": (0,)}, "gather the shards before saving"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_factors_of_other_shapes_are_named(case: str, tmp_path: Path) -> None:
    shapes, says = SHAPES[case]
    weights = safetensors(GOOD | {key: ("F32", shape) for key, shape in shapes.items()})
    assert says in both(write_folder(tmp_path / "ada", weights=weights))


WRAPPED = {
    "FSDP": lambda key: key.replace("layers.", "_fsdp_wrapped_module.layers._fsdp_wrapped_module."),
    "torch.compile": lambda key: "_orig_mod." + key,
    "checkpointing": lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "DistributedDataParallel": lambda key: "module." + key,
    "doubled": lambda key: PREFIX + key,
    "doubled and wrapped": lambda key: "module." + PREFIX + "_fsdp_wrapped_module." + key,
    "named": lambda key: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", key),
    "head too": lambda key: re.sub(r"(lora_[AB])\.weight", r"\1.ada.weight", key).replace(
        "score.", "score.modules_to_save.ada."
    ),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_wrappers_put_into_keys_is_taken_out(case: str, tmp_path: Path) -> None:
    weights = safetensors({WRAPPED[case](key): entry for key, entry in GOOD.items()})
    good, folder = write_folder(tmp_path / "good"), write_folder(tmp_path / "ada", weights=weights)
    for read in (Adapter.load, open_adapter):
        found = read(folder)
        assert list(found.layers) == list(Adapter.load(good).layers)
        assert list(found.tensors) == ["score.weight"]
        assert all(torch.equal(layer.A, torch.ones_like(layer.A)) for layer in found.layers.values())
    merged = aggregate([folder, good], method="rbla").adapter
    assert list(merged.layers) == ["layers.0.q", "layers.1.v"]


KEYS = {
    "wrapped base": ({key.replace(PREFIX, f"{PREFIX}module."): GOOD[key] for key in GOOD}, "adapter of the model inside"),
    "two adapters": (
        {**GOOD, A0.replace("weight", "one.weight"): GOOD[A0], B0.replace("weight", "two.weight"): GOOD[B0]},
        "several",
    ),
    "said twice": ({**GOOD, A0.replace("weight", "default.weight"): GOOD[A0]}, "two tensors are both called"),
    "the whole model": ({**GOOD, f"{PREFIX}layers.0.q.base_layer.weight": ("F32", (5, 6))}, "of the base model itself"),
    "kohya": ({"lora_unet_x.lora_down.weight": ("F32", (2, 6)), "lora_unet_x.lora_up.weight": ("F32", (6, 2))}, "kohya"),
    "diffusers": ({"unet.x_lora.down.weight": ("F32", (2, 6)), "unet.x_lora.up.weight": ("F32", (6, 2))}, "diffusers"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_of_which_more_than_one_thing_may_be_meant_are_refused(case: str, tmp_path: Path) -> None:
    tensors, says = KEYS[case]
    assert says in both(write_folder(tmp_path / "ada", weights=safetensors(tensors)))


def test_two_factors_for_one_place_are_refused(tmp_path: Path) -> None:
    """PEFT writes `.lora_A.weight` for a linear layer, `.lora_embedding_A` for an embedding, and never both for one."""
    for other in (A0.removesuffix(".weight"), A0.replace("lora_A.weight", "lora_embedding_A")):
        told = both(write_folder(tmp_path / "ada", weights=safetensors(GOOD | {other: ("F32", (2, 6))})))
        assert "layer layers.0.q: has factors of two layers, or of two kinds" in told


def test_a_module_of_the_models_own_called_module_is_one(tmp_path: Path) -> None:
    one = Adapter({"module.q": LoraLayer(torch.ones(2, 6), torch.ones(5, 2), 1.0)})
    assert list(Adapter.load(one.save(tmp_path / "ada")).layers) == ["module.q"]
    assert list(open_adapter(tmp_path / "ada").layers) == ["module.q"]


def test_what_is_given_in_the_place_of_a_folder_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("several/one"))
    write_folder(Path("several/two"))
    assert "name the folder it is in, several/one" in both(Path("several/one") / WEIGHTS)
    assert "adapters in its subfolders one, two: name one of them" in both(Path("several"))
    assert "hf download owner/name" in both(Path("owner/name"))
    assert "no such folder" in both(Path("a\0b"))
    assert "no such folder" in both(Path("x" * 10_000))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_may_have_any_name(name: str, tmp_path: Path) -> None:
    """It goes in and out as it is, or is refused; and where it is told it is one line."""
    tensors = {key.replace("layers.0.q", name): entry for key, entry in GOOD.items()}
    folder = write_folder(tmp_path / "ada", weights=safetensors(tensors))
    done_or_refused(lambda: aggregate_folders([folder], "rbla", tmp_path / "out"))
    if (tmp_path / "out").exists():
        assert open_adapter(tmp_path / "out" / "global").layers.keys() == Adapter.load(folder).layers.keys()


@settings(max_examples=80)
@given(st.integers(0, 2**32))
def test_a_folder_with_anything_wrong_in_it_merges_or_is_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    root = tmp_path_factory.mktemp("folders")
    folder, good = spoiled_folder(root / "ada", random.Random(seed)), write_folder(root / "good")
    one, two = done_or_refused(lambda: Adapter.load(folder)), done_or_refused(lambda: open_adapter(folder))
    if one is not None:
        assert two is not None
        assert one.ranks == two.ranks
    method = ("rbla", "raflora", "flexlora")[seed % 3]
    told = done_or_refused(lambda: aggregate_folders([folder, good], method, root / "out", ranks=[1, 3]))
    assert (told is not None) == (root / "out").exists()
    for part in told["folders"] if told else ():
        merged = Adapter.load(root / "out" / part)  # which reads nothing that is not finite
        assert all(math.isfinite(float(layer.delta().double().norm())) for layer in merged.layers.values())


# --- patterns --------------------------------------------------------------------------------------------------------

ATOMS = st.sampled_from(
    ["a", "b", r"\.", ".", "q", r"\d", r"\w", "[ab]", "[^a.]", "1", r"\b", "^", "$", r"\B", "(?=a)", "(?!b)"]
)
REPEATS = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "+?"])
# One level of repeats: `re` itself has to come to an end.
EXPRESSIONS = st.lists(
    st.one_of(ATOMS, st.builds("(?:{}{}){}".format, ATOMS, ATOMS, REPEATS), st.builds("({}|{})".format, ATOMS, ATOMS)),
    min_size=1, max_size=4,
).map("".join)  # fmt: skip


@settings(max_examples=400)
@given(EXPRESSIONS, st.text("ab.q1\n", max_size=8))
def test_patterns_match_as_pefts_do(pattern: str, name: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert Patterns("rank_pattern", {pattern: True}).value(name, False) is expected


SLOW = [
    "(a+)+$",
    "(a)" * 2000,
    "q{1,4294967294}",
    "((a{1,999}){1,999}){1,999}x",
    "((((a|b)*a)*b)*|a)*x",
    "(.*.*)*.*.*x",
    "(a|a)" * 1900,
]


@pytest.mark.parametrize("pattern", SLOW, ids=range(len(SLOW)))
@pytest.mark.parametrize("name", ["a" * 60, "a" * 100_000], ids=["short", "long"])
def test_no_pattern_takes_long(pattern: str, name: str) -> None:
    done_or_refused(lambda: Patterns("rank_pattern", {pattern: 1}).value(name, 0))


def test_many_patterns_for_many_layers_take_no_longer_than_reading_them() -> None:
    names = [f"model.layers.{i}.experts.{j}.up_proj" for i in range(40) for j in range(100)]
    anchored = Patterns("rank_pattern", {"^" + re.escape(name): place for place, name in enumerate(names)})
    began = time.process_time()
    assert [anchored.value(name, None) for name in names] == list(range(len(names)))
    assert time.process_time() - began < SOON


# --- numbers that are too large --------------------------------------------------------------------------------------


def adapter_of(value: float, dtype: torch.dtype = torch.float32, scaling: float = 1.0, rank: int = 2) -> Adapter:
    A, B = torch.full((rank, 6), value, dtype=dtype), torch.full((5, rank), value, dtype=dtype)
    return Adapter({"q": LoraLayer(A, B, scaling)})


LARGE = {
    "1e38": (1e38, torch.float32, 1.0),
    "1e30": (1e30, torch.float32, 1.0),
    "float16": (65504.0, torch.float16, 4.0),
    "alpha 1e29": (1e10, torch.float32, 1e29),
    "1e300": (1e300, torch.float64, 1.0),
    "bfloat16": (3e38, torch.bfloat16, 1.0),
}


@pytest.mark.parametrize(
    "method", ["rbla", "raflora", "flexlora", "flora", "fedex", "florist", "zeropad", "hetlora", "lora_fair"]
)
@pytest.mark.parametrize("case", LARGE)
def test_finite_factors_that_overflow_are_refused_and_nothing_is_written(case: str, method: str, tmp_path: Path) -> None:
    large = adapter_of(*LARGE[case])
    folders = [large.save(tmp_path / name) for name in ("one", "two")]
    told = refused(lambda: aggregate_folders(folders, method, tmp_path / "out"), AdapterError)
    assert "too large" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert "too large" in refused(lambda: aggregate([ClientUpdate(large, 1, "a")], method=method), AdapterError)


def test_large_numbers_that_do_fit_are_merged(tmp_path: Path) -> None:
    A, B = torch.full((2, 6), 1e30), torch.full((5, 2), 1e-20)
    merged = aggregate([ClientUpdate(Adapter({"q": LoraLayer(A, B, 1.0)}), 1, "a")], method="rbla").adapter
    torch.testing.assert_close(merged.layers["q"].delta(), B @ A)


# --- words of a command ----------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_any_words_are_taken_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    done_or_refused(lambda: arguments.updates([words(chance) for _ in range(3)]))
    done_or_refused(lambda: arguments.ranks(words(chance)))
    done_or_refused(lambda: arguments.options([words(chance)]))


@given(st.lists(st.fractions(Fraction(1, 1000), 1000, max_denominator=1000), min_size=1, max_size=5), st.integers(1, 50))
def test_equal_ratios_are_equal_weights(weights: list[Fraction], times: int) -> None:
    exact = [weight for weight in weights if math.log10(weight.denominator).is_integer()] or [Fraction(1, 4)]
    spelt = [f"c{i}={float(weight):.10f}" for i, weight in enumerate(exact)]
    again = [f"c{i}={float(weight * times):.10f}" for i, weight in enumerate(exact)]
    if any(weight.denominator != 1 for weight in exact) and any((weight * times).denominator != 1 for weight in exact):
        assert arguments.updates(spelt) == arguments.updates(again)


def test_weights_may_be_shares_and_whole_numbers_stay() -> None:
    assert arguments.updates(["a=0.25", "b=0.75"]) == [("a", 1), ("b", 3)]
    assert arguments.updates(["a=2", "b=6"]) == [("a", 2), ("b", 6)]
    assert arguments.updates(["a=.5", "b=1e1"]) == [("a", 1), ("b", 20)]
    for wrong in ("nan", "inf", "-1", "0", "0.0", "1e999999999", "1/3", "٣", "9" * 5000, "1e60"):
        refused(lambda wrong=wrong: arguments.updates(["a=1", f"b={wrong}"]), AdapterError)


@pytest.fixture
def anyrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command in this process, in an empty folder: exit status, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anyrank", *words])
        threads = torch.get_num_threads()
        try:
            main()
            status = 0
        except SystemExit as done:
            status = done.code or 0
        torch.set_num_threads(threads)
        told = capsys.readouterr()
        return status, told.out, told.err

    monkeypatch.chdir(tmp_path)
    return call


@pytest.mark.parametrize(
    "words",
    [
        ("aggregate", "--method", "rbla", "--out", "out", "--ranks", "1000000000", "ada"),
        ("aggregate", "--method", "rbla", "--out", "out", "--ranks", "9" * 5000, "ada"),
        ("aggregate", "--method", "raflora", "--out", "out", "--option", "seed=3", "ada"),
        ("aggregate", "--method", "raflora", "--out", "out", "--option", "out=x", "ada"),
        ("aggregate", "--method", "rbla", "--out", "out", "owner/name"),
        ("aggregate", "--method", "rbla", "--out", "out", "\x1b[31m[/x]\n"),
        ("inspect", "[/x]\x1b]0;title\x07"),
        ("compare", "none.toml", "--methods", "rbla", "--jobs", "-1"),
        ("study", "none.toml", "--jobs", "-1"),
        ("demo", "--jobs", "-1"),
    ],
    ids=range(10),
)
def test_a_wrong_request_is_one_line(words: tuple[str, ...], anyrank) -> None:
    write_folder(Path("ada"))
    status, out, err = anyrank(*words)
    assert (status, out) == (2, "")
    assert err.endswith("\n")
    assert printable(err[:-1]) == err[:-1]
    assert [path.name for path in Path().iterdir()] == ["ada"]


SMALL = '[run]\nrounds = 1\n[model]\nname = "digits-mlp"\n[train]\nlocal_steps = 1\n'


@pytest.mark.parametrize("kind", ["EROFS", "EDQUOT", "EFBIG"])
def test_a_disk_that_takes_nothing_ends_a_run_with_status_1(kind: str, anyrank, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: str, path: Path) -> None:
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)), str(path))

    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    Path("small.toml").write_text(SMALL)
    assert anyrank("run", "small.toml", "--out", "first")[0] == 0  # which fills the cache
    monkeypatch.setattr(files, "reached", refuse)
    status, out, err = anyrank("run", "small.toml", "--out", "out")
    assert (status, out) == (1, "")
    assert f"cannot be written ({os.strerror(getattr(errno, kind))})" in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="there is no folder in which nobody may make another")
@pytest.mark.parametrize("out", ["/sys/anyrank", "small.toml", "small.toml/run"])
def test_a_place_where_no_run_can_be_is_one_line(out: str, anyrank, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    Path("small.toml").write_text(SMALL)
    status, said, err = anyrank("run", "small.toml", "--out", out)
    assert (status, said) == (1 if out.startswith("/sys") else 2, "")
    assert err.startswith(f"anyrank: {out}: ")
    assert len(err.splitlines()) == 1
    assert Path("small.toml").read_text() == SMALL


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\\b", "a\0b", "x" * 300])
def test_a_run_is_called_as_a_folder_can_be(name: str) -> None:
    from anyrank.config.sections import RunConfig

    refused(lambda: RunConfig(name=name), ConfigError)


def test_a_page_is_written_over_pages_alone(tmp_path: Path) -> None:
    log, page = tmp_path / "metrics.jsonl", tmp_path / "report.html"
    log.write_text('{"round": 1}\n')
    for wrong in (log, tmp_path, log / "x.html", tmp_path / ("x" * 300)):
        refused(lambda wrong=wrong: check_out(wrong), RunError)
    page.write_text("\n<!DOCTYPE html>\n")
    assert check_out(page) == page
    assert check_out(tmp_path / "new" / "report.html").parent.is_dir()
    assert log.read_text() == '{"round": 1}\n'


# --- names -----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_a_printable_text_is_one_line_and_says_itself(text: str) -> None:
    told = printable(text)
    assert printable(told) == told
    assert len(told.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", told)
    assert told == text or any(letter in text for letter in set(text) - set(told))
    assert str(AnyRankError(text[:500])) == printable(text[:500])


def on_the_terminal(*things: Any) -> str:
    shown = type(console.out)(file=StringIO(), force_terminal=True, color_system="truecolor", width=400, highlight=False)
    for thing in things:
        shown.print(thing)
    return re.sub(r"\x1b\[[0-9;]*m(?=[^m]*)", "", shown.file.getvalue())


@given(st.sampled_from(NAMES) | st.text(max_size=30))
def test_names_on_a_terminal_are_what_they_are(name: str) -> None:
    from anyrank.cli import tables

    name = name[:300]
    figures = {"norm": 1.0, "effective_rank": 1.0, "energy_past": {"1": 0.0}}
    layer = {"layer": name, "rank": 1, "scaling": 1.0, "values": [1.0], **figures}
    report = {"adapter": name, "total": {"layers": 1, "ranks": [1], **figures}, "layers": [layer]}
    told = on_the_terminal(*tables.inspection_tables([report]), console.shown(name))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", told)
    assert "[/x]" in told if "[/x]" in name else True


@pytest.mark.parametrize("name", ["[/x]", "<script>", "\u202eevil", "$x^{$", "a\x1b[31m"])
def test_names_in_a_report_are_escaped(name: str, tmp_path: Path) -> None:
    from test_report import write_run

    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"label": name, "base_model": name, "task": name}))
    page = build_report([run], tmp_path / "report.html").read_text()
    assert "<script>" not in page.replace("<script>\n", "")
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e]", page)


# --- replies ---------------------------------------------------------------------------------------------------------


class Hostile(Script):
    """An engine in which client-1 sends whatever a seed says, and the others are honest. `silent`: client-1 sends nothing."""

    def __init__(self, seed: int, silent: bool = False, make: Callable = hostile_reply) -> None:
        super().__init__({"client-1": "silent"})
        self._chance, self._silent, self._make = random.Random(seed), silent, make

    def train(self, jobs: Sequence[Job], plan: Plan, mechanism: None = None, deadline_s=None) -> Iterator[Any]:
        yield from super().train(jobs, plan, mechanism)
        if not self._silent:
            yield self._make(next(job for job in jobs if job.client.name == "client-1"), self._chance)


def state_after(folder: Path, engine: Script) -> Any:
    built, store = build(folder, engine, rounds=1)
    with store:
        loop.run(built, store)
        return store.restore()


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> LoraLayer:
    """What a run ends with in which client-1 sends nothing."""
    return state_after(tmp_path_factory.mktemp("without"), Hostile(0, silent=True)).adapter.layers["x"]


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_a_hostile_reply_is_a_row_and_leaves_no_trace(
    tmp_path_factory: pytest.TempPathFactory, without: LoraLayer, seed: int
) -> None:
    """The run goes on, and its state is that of a run in which the client sent nothing."""
    root, began = tmp_path_factory.mktemp("runs"), time.process_time()
    one, two = state_after(root / "a", Hostile(seed)).adapter.layers["x"], without
    assert time.process_time() - began < SOON
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)
    text = (root / "a" / "run" / "clients.jsonl").read_text()
    assert len(text) < 20_000
    found = rows(root / "a", "clients.jsonl")
    assert [row["status"] for row in found if row["client"] == "client-1"] in (["rejected"], ["failed"])
    assert all(printable(row["reason"]) == row["reason"] for row in found)


def honest_reply(job: Job, **fields: Any) -> Any:
    """What client-1 would send if it were honest, with other fields than its checks would have let pass."""
    name, layer = next(iter(job.download.adapter.layers.items()))
    moved = Adapter({name: layer.with_factors(layer.A, layer.B + 1.5)})  # where it counts, the state shows it
    return forced(Update(moved, job.num_examples, job.client.name, {"loss": 1.0}), **fields)


def broken_layers(layers: Any) -> Callable[[Job], Any]:
    return lambda job: honest_reply(job, adapter=forced(job.download.adapter, layers=layers))


REPLIES: dict[str, Callable[[Job], Any]] = {  # what client-1 sends that is no update at all, or none that can be used
    "metrics of None": lambda job: honest_reply(job, metrics=None),
    "a loss of 400 digits": lambda job: honest_reply(job, metrics={"loss": 10**400}),
    "a thousand metrics": lambda job: honest_reply(job, metrics={str(i): 1.0 for i in range(1000)}),
    "a count that is a truth value": lambda job: honest_reply(job, num_examples=True),
    "an adapter of None": lambda job: honest_reply(job, adapter=None),
    "no layers": broken_layers({}),
    "layers that break when they are read": broken_layers(Breaks()),
    "layers without an end": broken_layers(Breaks(endless=True)),
    "a layer of which nothing can be read": broken_layers({"x": Liar()}),
    "a failure with a reason of 100,000 characters": lambda job: Failure(job.client.name, Code.CRASHED, "x" * 100_000 + "\n"),
}


@pytest.mark.parametrize("case", REPLIES)
def test_a_reply_that_is_no_update_is_a_row_of_its_client(case: str, tmp_path: Path, without: LoraLayer) -> None:
    honest = state_after(tmp_path / "honest", Hostile(0, make=lambda job, chance: honest_reply(job))).adapter.layers["x"]
    assert not torch.equal(honest.B, without.B)
    found = state_after(tmp_path, Hostile(0, make=lambda job, chance: REPLIES[case](job))).adapter.layers["x"]
    assert torch.equal(found.A, without.A)
    assert torch.equal(found.B, without.B)
    (row,) = (row for row in rows(tmp_path, "clients.jsonl") if row["client"] == "client-1")
    assert row["status"] == ("failed" if case.startswith("a failure") else "rejected")
    assert 0 < len(row["reason"]) < 2000
    assert printable(row["reason"]) == row["reason"]


NAMELESS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a dict": dict,
    "a list": lambda: [1],
    "a number": lambda: 7,
    "a text": lambda: "client-1",
    "bytes": lambda: b"client-1",
    "an object of which nothing can be read": Liar,
}


@pytest.mark.parametrize("case", NAMELESS)
def test_a_reply_that_names_nobody_is_a_row_and_nothing_else(case: str, tmp_path: Path, without: LoraLayer) -> None:
    found = state_after(tmp_path, Hostile(0, make=lambda job, chance: NAMELESS[case]())).adapter.layers["x"]
    assert torch.equal(found.B, without.B)
    told = {row["status"]: row for row in rows(tmp_path, "clients.jsonl") if row["status"] != "ok"}
    assert told.keys() == {"stray", "failed"}
    assert (told["failed"]["client"], told["failed"]["reason"]) == ("client-1", "sent nothing")


def reply_of(job_download: Download, **factors: Any) -> Update:
    layer = job_download.adapter.layers["x"]
    return Update(Adapter({"x": forced(layer, **factors)}), 3, "ada", {"loss": 1.0})


def download() -> Download:
    return Download(Adapter({"x": LoraLayer(torch.ones(2, 6), torch.zeros(5, 2), 1.0)}), {"x": (0, 1)})


@pytest.mark.parametrize("kind", odd_tensors(torch.ones(5, 2)))
def test_no_odd_tensor_is_believed(kind: str) -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is, `collect` makes a row of it
        admit(reply_of(download(), A=torch.full((2, 6), 1e30), B=odd_tensors(torch.ones(5, 2))[kind]), download(), "ada", 3)
    assert not isinstance(error.value, (KeyboardInterrupt, SystemExit))


def test_believed_tensors_are_the_servers_own() -> None:
    big = torch.arange(10.0)
    sent = {
        "requires grad": torch.ones(5, 2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(5, 2)),
        "not contiguous": torch.ones(2, 5).T,
        "expanded": torch.ones(1, 2).expand(5, 2),
        "a view": big.view(5, 2),
        "negated lazily": torch.ones(5, 2, dtype=torch.complex64).conj().imag,
        "of a graph": torch.ones(5, 2, requires_grad=True) * 2,
    }
    for kind, B in sent.items():
        A = torch.ones(2, 6)
        believed = admit(reply_of(download(), A=A, B=B), download(), "ada", 3).adapter.layers["x"]
        assert torch.equal(believed.B, B.detach()), kind
        assert not believed.B.requires_grad, kind
        assert type(believed.B) is torch.Tensor, kind
        assert believed.B.is_contiguous(), kind
        assert not believed.B.is_neg(), kind
        assert believed.B.untyped_storage().data_ptr() != B.untyped_storage().data_ptr(), kind
        A.fill_(math.nan)
        assert torch.equal(believed.A, torch.ones(2, 6)), kind


def test_metrics_of_numpy_are_numbers() -> None:
    import numpy as np

    update = forced(reply_of(download(), B=torch.ones(5, 2)), metrics={"loss": np.float32(0.5), "steps": np.int64(3)})
    metrics = admit(update, download(), "ada", 3).metrics
    assert metrics == {"loss": 0.5, "steps": 3}
    assert [type(value) for value in metrics.values()] == [float, int]


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_of_any_name_is_a_row(name: str, tmp_path: Path) -> None:
    def make(job: Job, chance: random.Random) -> Any:
        return forced(Failure(name, None), reason="\x1b[31m")

    state_after(tmp_path, Hostile(0, make=make))
    (row,) = (row for row in rows(tmp_path, "clients.jsonl") if row["status"] == "stray")
    assert len(row["client"]) <= 100
    assert printable(row["client"]) == row["client"]


def test_valid_bytes_pass_as_they_are(tmp_path: Path) -> None:
    """The mutated inputs above begin as good ones: a check of the checks."""
    folder = write_folder(tmp_path / "ada")
    loaded = Adapter.load(folder)
    assert loaded.ranks == {"layers.0.q": 2, "layers.1.v": 2}
    assert open_adapter(folder).ranks == loaded.ranks
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    assert Adapter.load(folder).ranks == loaded.ranks

"""Whatever is handed in at a door of the library: success, or one line, soon, in little memory; what was whole stays whole.

`tests/doors.py` has the doors, `tests/oracle.py` the promise. Hypothesis draws what is handed in here, and cases are written by
hand. `make fuzz` goes on from here by coverage.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import doors
import hostile
from anyrank.config import Config, DataConfig, from_table, load, override
from anyrank.data import arrays, images, instructions, texts
from anyrank.data.split import held_out, ordered
from anyrank.errors import AnyRankError, DataError, RunError, nearest, printable
from anyrank.files import check_depth, parse_json, read_bounded, walk
from anyrank.report import runs as reports
from anyrank.runs.folder import RunDir
from anyrank.runs.names import read_lines, read_object
from oracle import LONGEST, Broken, contents, outcome, refusal, unchanged

bounded = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# --- the oracle itself -------------------------------------------------------------------------------------------------


def _raise(error: BaseException) -> Any:
    raise error


def _endless() -> None:
    while True:
        pass


BREAKS: dict[str, tuple[Callable[[], Any], str]] = {
    "another error": (lambda: {}["x"], "KeyError"),
    "a recursion without end": (lambda: (lambda f: f(f))(lambda f: f(f)), "RecursionError"),
    "an exit": (lambda: sys.exit(3), "SystemExit"),
    "a line without end": (lambda: _raise(type("Long", (AnyRankError,), {"__str__": lambda _: "x" * 5000})()), "no printable"),
    "two lines": (lambda: _raise(type("Two", (AnyRankError,), {"__str__": lambda _: "a\nb"})()), "no printable"),
    "an empty line": (lambda: _raise(DataError("")), "no printable"),
    "an escape": (lambda: _raise(type("Red", (AnyRankError,), {"__str__": lambda _: "\x1b[31m"})()), "no printable"),
    "a hang": (_endless, "not done after"),
    "too much memory": (lambda: bytearray(200 << 30), "MemoryError"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_the_oracle_sees_each_way_to_break_the_promise(case: str) -> None:
    act, says = BREAKS[case]
    with pytest.raises(Broken, match=says):
        outcome(act, seconds=0.5)


def test_the_oracle_sees_what_did_not_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("whole")
    for change in (
        lambda: (tmp_path / "a").write_text("half"),
        lambda: (tmp_path / "a").unlink(),
        lambda: (tmp_path / "b").write_text("new"),
        lambda: (tmp_path / "c").symlink_to("a"),
    ):
        with pytest.raises(Broken):
            outcome(change, whole=tmp_path)
    before = contents(tmp_path)
    (tmp_path / ".lock").touch()
    unchanged(before, contents(tmp_path), lambda name: name == ".lock")


def test_every_door_takes_its_valid_inputs() -> None:
    """Else the doors would be tried with nothing that gets past the first check."""
    for name, first, word in (
        ("adapter", 2, "merged"),
        ("config", 2, "read"),
        ("data", len(doors.sources()), "read"),
        ("frame", 8, "read"),
    ):
        assert [doors.enter(name, seed) for seed in doors.DOORS[name].seeds()[:first]] == [word] * first
    whole = [doors.enter("run", hostile_free(which)) for which in (0, 1)]
    assert whole == [f"round {doors.ROUNDS}", "round 2"]


def hostile_free(which: int) -> bytes:
    """The input of the run folder `which` as it is: its first file, the adapter's or its checkpoint's, with its own bytes."""
    files = doors.run_folders()[1][which]
    return doors.BYTES + bytes([which]) + files[sorted(files)[0]]


# --- the doors, by chance ----------------------------------------------------------------------------------------------


def _spoiled(door: str) -> st.SearchStrategy[bytes]:
    """A valid input with bytes changed, or draws for a source of chance that spoils one."""
    seeds = [seed for seed in doors.DOORS[door].seeds() if len(seed) < 20_000]
    chance = st.binary(min_size=1, max_size=48)
    damaged = st.builds(
        lambda seed, draws: seed[:2] + hostile.spoiled_bytes(seed[2:], hostile.Chance(draws)), st.sampled_from(seeds), chance
    )
    drawn = st.builds(lambda which, draws: doors.CHANCE + which + draws, st.binary(min_size=1, max_size=1), chance)
    return damaged | drawn


@given(data=st.deferred(lambda: _spoiled("adapter")))
@bounded
def test_an_adapter_folder_is_merged_whole_or_refused(data: bytes) -> None:
    doors.enter("adapter", data)


@given(data=st.deferred(lambda: _spoiled("frame")))
@bounded
def test_a_frame_is_read_as_what_it_says_or_refused(data: bytes) -> None:
    doors.enter("frame", data)


@given(data=st.deferred(lambda: _spoiled("config")))
@bounded
def test_a_configuration_is_read_and_written_back_or_refused(data: bytes) -> None:
    doors.enter("config", data)


@given(data=st.deferred(lambda: _spoiled("data")))
@settings(bounded, max_examples=400)
def test_a_source_of_data_is_read_to_its_end_or_refused(data: bytes) -> None:
    doors.enter("data", data)


@given(data=st.deferred(lambda: _spoiled("run")))
@settings(bounded, max_examples=150)
def test_a_run_folder_is_gone_on_with_from_a_whole_round_or_refused(data: bytes) -> None:
    doors.enter("run", data)


@given(data=st.binary(max_size=48))
@bounded
def test_a_reply_enters_the_round_or_is_a_row(data: bytes) -> None:
    doors.enter("reply", data)


# --- files of a wrong kind or size -------------------------------------------------------------------------------------

READS = {"texts": texts.load_split, "instructions": instructions.load_split, "images": images.load_split}


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def a_folder(path: Path) -> None:
    path.mkdir()


KINDS = (a_pipe, a_device, a_link_to_itself, a_socket, a_folder)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.npz"])
@pytest.mark.parametrize("read", READS)
def test_what_is_no_file_is_refused_and_not_waited_for(
    read: str, name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / name)
    assert name in refusal(lambda: READS[read](DataConfig(source=str(tmp_path / name))), whole=tmp_path, seconds=5)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "a/0.png", "metadata.csv"])
def test_no_part_of_a_folder_of_images_is_waited_for(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    kind = doors.sources()["idx" if name.startswith("train") else "metadata"]
    for file, data in kind.files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    (tmp_path / name.removesuffix(".gz")).unlink()
    make(tmp_path / name)
    told = outcome(lambda: [part.stacked() for part in images.load_split(DataConfig(source=str(tmp_path)))], whole=tmp_path)
    assert told.refusal or (make is a_folder and name == "a/0.png")  # a folder in a class is looked into, and is empty


@pytest.mark.parametrize("make", KINDS)
def test_a_configuration_and_the_files_of_a_run_are_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "run.toml")
    assert "run.toml" in refusal(lambda: load(tmp_path / "run.toml"), seconds=5)
    (tmp_path / "config.toml").write_text("[run]\n")
    for name in ("summary.json", "metrics.jsonl", "clients.jsonl"):
        make(tmp_path / name)
    assert "metrics.jsonl" in refusal(lambda: read_lines(tmp_path / "metrics.jsonl"), seconds=5)
    assert "summary.json" in refusal(lambda: read_object(tmp_path / "summary.json"), seconds=5)
    assert "summary.json" in refusal(lambda: reports.read(tmp_path), seconds=5)


@pytest.mark.parametrize("name", ["a\0b.csv", "x" * 5000 + ".csv", "\ud800.csv", "x" * 5000, "/dev/zero", "/proc/self/mem"])
@pytest.mark.parametrize("read", READS)
def test_no_name_of_a_source_is_too_odd(read: str, name: str) -> None:
    refusal(lambda: READS[read](DataConfig(source=name)))


def test_a_loop_of_folders_has_an_end(tmp_path: Path) -> None:
    for file, data in doors.sources()["png"].files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    train, test = images.load_split(DataConfig(source=str(tmp_path)))
    assert len(train) + len(test) == 12  # every picture once


def test_folders_nested_deeper_than_python_calls_are_walked(tmp_path: Path) -> None:
    at, before = tmp_path, Path.cwd()
    try:
        for _ in range(1200):
            os.mkdir("d") if at != tmp_path else (at / "d").mkdir()
            os.chdir(at / "d" if at == tmp_path else "d")
            at = Path("d")
        Path("x.png").write_bytes(b"x")
    finally:
        os.chdir(before)
    try:
        assert [path.name for path in walk(tmp_path)] == ["x.png"]
        with pytest.raises(OSError, match="at most 1,000"):
            list(walk(tmp_path, most=1000))
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # shutil calls itself for each level


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bounded(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="at most 4 bytes, got 5"):
        read_bounded(tmp_path / "a", 4)
    with open(tmp_path / "large.csv", "wb") as file:
        file.truncate(1 << 40)  # a terabyte, none of it on the disk
    (tmp_path / "large.npz").symlink_to(tmp_path / "large.csv")
    (tmp_path / "large.json").symlink_to(tmp_path / "large.csv")
    for name in ("large.csv", "large.json"):
        assert "at most" in refusal(lambda name=name: texts.load(DataConfig(source=str(tmp_path / name))))
    refusal(lambda: images.load_split(DataConfig(source=str(tmp_path / "large.npz"))))


# --- tables and JSON ---------------------------------------------------------------------------------------------------


def source(path: Path, content: bytes, **keys: Any) -> DataConfig:
    path.write_bytes(content)
    return DataConfig(source=str(path), **keys)


ROWS = "".join(f"caf\u00e9 {i},{i % 2}\n" for i in range(10))
TABLES = {
    "wide": (b",".join(b"c%d" % i for i in range(100_000)) + b"\n", "at most 4,096 columns, got 100,000"),
    "one long line": (b"text,label\n" + b"x" * 20_000_000, "field larger than field limit"),
    "an open quote": (b'text,label\n"' + b"a,b\n" * 100_000, "is a quote not closed?"),
    "semicolons": (b"text;label\na, b;1\n", 'set data.delimiter = ";"'),
    "tabs": (b"text\tlabel\na\t1\n", r'set data.delimiter = "\t"'),
    "bars": (b"text|label\na|1\n", 'set data.delimiter = "|"'),
    "latin-1": (
        ("text,label\n" + ROWS).encode("latin-1"),
        "not UTF-8 text (byte 14: invalid continuation byte); set data.encoding",
    ),
    "utf-16": (("text,label\n" + ROWS).encode("utf-16"), "such as 'utf-16'"),
    "utf-16 without its mark": ("text,label\na,b\n".encode("utf-16-le"), "set data.encoding = 'utf-16'"),
    "NUL": (b"text,label\na,1\nb\0c,1\n", "line 3: a NUL character"),
    "a column twice": (b"text,label,label\na,1,2\n", "'label' is there twice"),
    "only a header": (b"text,label\n", "got none"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_cannot_be_read_says_how_it_can(case: str, tmp_path: Path) -> None:
    content, says = TABLES[case]
    assert says in refusal(lambda: texts.load(source(tmp_path / "a.csv", content)))


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(";", "latin-1"), ("\t", "utf-16"), ("|", "cp1252"), ("", "utf-8-sig"), (",", "utf-16-le")]
)
def test_other_separators_and_encodings_read_the_same_rows(delimiter: str, encoding: str, tmp_path: Path) -> None:
    usual = texts.load(source(tmp_path / "usual.csv", ("text,label\n" + ROWS).encode()))
    other = ("text,label\n" + ROWS).replace(",", delimiter or ",").encode(encoding)
    table = texts.load(source(tmp_path / "other.csv", other, delimiter=delimiter, encoding=encoding))
    assert (table.texts, table.label_names, table.labels.tolist()) == (usual.texts, usual.label_names, usual.labels.tolist())
    assert table.texts[0] == "caf\u00e9 0"
    lines = "".join(json.dumps({"text": text, "label": "x"}, ensure_ascii=False) + "\n" for text in table.texts)
    assert texts.load(source(tmp_path / "a.jsonl", lines.encode(encoding), encoding=encoding)).texts == usual.texts


@pytest.mark.parametrize("key", ["delimiter", "encoding"])
@pytest.mark.parametrize("value", [",,", '"', "\n", "\0", "no-such", "idna", "undefined", "base64", "../x", "x" * 10_000])
def test_keys_that_are_no_separator_and_no_encoding_are_refused(key: str, value: str) -> None:
    assert f"data.{key}" in refusal(lambda: from_table({"data": {key: value}}))


JSON = {
    "nested 100,000 deep": (b'{"text":' + b"[" * 100_000, "nested more than 32 deep"),
    "nested 500 deep": (b'{"text": "a", "label":' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 32 deep"),
    "a label that is NaN": (b'{"text": "a", "label": NaN}', "expected a label"),
    "a label that is a fraction": (b'{"text": "a", "label": 0.5}', "expected a label"),
    "a label that is a list": (b'{"text": "a", "label": [1]}', "expected a label"),
    "a number of 5,000 digits": (b'{"text": "a", "label": ' + b"9" * 5000 + b"}", "4300 digits"),
    "half of a pair": (rb'{"text": "\ud800", "label": 1}', r"half of a surrogate pair, '\ud800'"),
    "100,000 keys": (b"{" + b",".join(b'"k%d": 1' % i for i in range(100_000)) + b"}", "at most 4,096 columns"),
}


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("read", ["texts", "instructions"])
def test_json_that_cannot_be_read_says_why(case: str, suffix: str, read: str, tmp_path: Path) -> None:
    content, says = JSON[case]
    keys = {"prompt": "text", "completion": "text", "template": "{text}"} if read == "instructions" else {}
    told = refusal(lambda: READS[read](source(tmp_path / f"a{suffix}", content + b"\n", **keys)))
    assert says in told


def test_depth_is_counted_in_tables_and_lists_alike() -> None:
    assert parse_json("[" * 32 + "]" * 32) == eval("[" * 32 + "]" * 32)
    check_depth(hostile.nested(32))
    for text in ("[" * 34 + "]" * 34, '{"a":' * 34 + "1" + "}" * 34, "[" * 100_000):
        with pytest.raises(ValueError, match="nested|Expecting"):
            parse_json(text)
    with pytest.raises(ValueError, match="nested"):
        check_depth(hostile.nested(34))


def test_labels_of_a_thousand_digits_are_names() -> None:
    assert ordered(["9" * 5000, "10"]) == ("10", "9" * 5000)


@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=60), fraction=st.floats(0.01, 0.99))
@settings(max_examples=100)
def test_held_out_rows_are_drawn_as_label_by_label(labels: list[int], fraction: float) -> None:
    """The fast grouping of rows by their labels against the search for each label, which took the square of their number."""
    from anyrank import keys

    rows = np.array(labels)
    found = held_out(rows, fraction)
    rng, slow = keys.rng(0, "test-split"), np.zeros(len(rows), dtype=bool)
    for label in range(rows.max() + 1):
        slow[rng.permutation(np.flatnonzero(rows == label))[: int(found[rows == label].sum())]] = True
    assert found.tolist() == slow.tolist()


def test_a_column_of_names_taken_for_labels_does_not_take_for_ever(tmp_path: Path) -> None:
    rows = b"".join(b"text,id-%d\n" % i for i in range(30_000))
    assert "leave none to hold out" in refusal(lambda: texts.load_split(source(tmp_path / "a.csv", b"text,label\n" + rows)))


def test_the_nearest_of_many_long_names_is_found_soon() -> None:
    assert outcome(lambda: nearest("x" * 10**6, [f"{i}" * 10**5 for i in range(20)] + ["y" * 10**5])).value


def test_an_empty_answer_of_a_commonsense_row_is_named(tmp_path: Path) -> None:
    row = {"instruction": "?\n\nAnswer format: a/b", "output": "a", "answer": ""}
    told = refusal(
        lambda: instructions.load_split(source(tmp_path / "a.jsonl", json.dumps(row).encode(), format="commonsense"))
    )
    assert "line 1" in told
    assert "expected an answer among a, b" in told


# --- arrays and pictures -----------------------------------------------------------------------------------------------


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def declaring(shape: tuple[int, ...], dtype: str = "|u1", content: bytes = b"") -> bytes:
    """An array that says it has this shape, whatever follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


PIXELS, LABELS = npy(np.zeros((8, 4, 4), np.uint8)), npy(np.arange(8) % 2)
ARRAYS = {
    "objects": (archive(image=PIXELS, label=npy(np.array([print] * 8))), "holds Python objects, which are never read"),
    "a boast": (archive(image=declaring((10**12,)), label=LABELS), "declares more numbers than follow"),
    "a boast beyond 64 bits": (archive(image=declaring((2**40, 2**40)), label=LABELS), "declares more numbers than follow"),
    "a negative size": (archive(image=declaring((-1, 3)), label=LABELS), "not readable as an .npz"),
    "no array": (archive(image=b"hello", label=LABELS), "not readable as an .npz"),
    "no archive": (b"PK\3\4junk", "not readable as an .npz"),
    "an empty archive": (archive(), "no array 'image'"),
    "characters beyond Unicode": (archive(image=PIXELS, label=declaring((8,), "<U1", b"\xff" * 32)), "'label' is no array of"),
    "half pairs": (archive(image=PIXELS, label=LABELS, x=declaring((8,), "<U1", b"\0\xd8\0\0" * 8)), "'x' is no array of"),
    "labels that are NaN": (archive(image=PIXELS, label=npy(np.full(8, np.nan))), "expected whole numbers or names"),
    "records": (archive(image=PIXELS, label=npy(np.zeros(8, dtype=[("a", "i4")]))), "expected whole numbers or names"),
    "images of no pixels": (archive(image=npy(np.zeros((8, 0, 4), np.uint8)), label=LABELS), "expected uint8 pixels"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_archive_of_arrays_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    content, says = ARRAYS[case]
    assert says in refusal(lambda: images.load_split(source(tmp_path / "a.npz", content)))


def test_an_archive_that_unpacks_to_more_than_memory_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_MOST_BYTES", 1 << 20)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    large = source(tmp_path / "a.npz", archive(image=npy(np.zeros((2 << 16, 4, 4), np.uint8)), label=LABELS))
    assert Path(large.source).stat().st_size < 10_000
    assert "at most 1,048,576 bytes" in refusal(lambda: images.load_split(large))


GOOD_LABELS = struct.pack(">4BI", 0, 0, 8, 1, 8) + bytes([0, 1] * 4)
IDX = {
    "a boast": (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(128), "but 0 follow"),
    "a boast that overflows to none": (struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 4), "but 0 follow"),
    "a boast that is just not too large": (struct.pack(">4B3I", 0, 0, 8, 3, 1, 2**16, 2**15) + bytes(9), "but 9 follow"),
    "images of no pixels": (struct.pack(">4B3I", 0, 0, 8, 3, 8, 0, 4), "expected images"),
    "a header cut short": (b"\0\0\x08\3\0", "damaged or truncated"),
    "nothing": (b"", "got nothing"),
    "more than it declares": (struct.pack(">4B3I", 0, 0, 8, 3, 8, 4, 4) + bytes(100_000_000), "but more follow"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", IDX)
def test_an_idx_file_is_read_as_far_as_it_declares(case: str, packed: bool, tmp_path: Path) -> None:
    content, says = IDX[case]
    if packed:
        content = gzip.compress(content, 1, mtime=0)
    (tmp_path / f"train-images-idx3-ubyte{'.gz' * packed}").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(GOOD_LABELS)
    assert says in refusal(lambda: images.load_split(DataConfig(source=str(tmp_path))))


def picture(size: tuple[int, int], mode: str = "L") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


PICTURES = {
    "cut short": (lambda: picture((4, 4))[:40], "not readable as an image"),
    "empty": (lambda: b"", "not readable as an image"),
    "another size": (lambda: picture((5, 4)), "make all images of one size"),
    "400 million pixels": (lambda: picture((20_000, 20_000), "1"), "not readable as an image"),
    "90 million pixels": (lambda: picture((9500, 9500), "1"), "pixels are more than"),
    "a program in PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not readable as an image"),
}


@pytest.mark.parametrize("case", PICTURES)
@pytest.mark.filterwarnings("error")
def test_a_picture_that_is_none_is_named(case: str, tmp_path: Path) -> None:
    make, says = PICTURES[case]
    for file, data in doors.sources()["png"].files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    (tmp_path / "b" / "0.png").write_bytes(make())
    told = refusal(lambda: [part.stacked() for part in images.load_split(DataConfig(source=str(tmp_path)))])
    assert says in told
    assert "0x" not in told  # no address of an object in memory


def test_a_class_whose_name_no_text_file_can_hold_is_refused(tmp_path: Path) -> None:
    for file, data in doors.sources()["png"].files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    try:
        os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xff")
    except OSError:
        pytest.skip("this file system holds names of Unicode alone")
    assert r"'\udcff'" in refusal(lambda: images.load_split(DataConfig(source=str(tmp_path))))


def parquet(path: Path, table: Any) -> DataConfig:
    from pyarrow import parquet

    parquet.write_table(table, path)
    return DataConfig(source=str(path))


def test_parquet_files_are_read_within_bounds_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from anyrank.data import hub

    def table(labels: list, **columns: list) -> Any:
        return pyarrow.table({"text": ["a"] * len(labels), "label": labels, **columns})

    assert len(texts.load(parquet(tmp_path / "good.parquet", table([0, 1])))) == 2
    assert "expected a label" in refusal(lambda: texts.load(parquet(tmp_path / "nan.parquet", table([0.5, float("nan")]))))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["text", "label", "label"])
    assert "2 times" in refusal(lambda: texts.load(parquet(tmp_path / "twice.parquet", twice)))
    whole = (tmp_path / "good.parquet").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.parquet").write_bytes(whole[:length])
        refusal(lambda: texts.load(DataConfig(source=str(tmp_path / "cut.parquet"))))
    names = {"label": {"names": ["n", "p"], "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    named = table([1, 7]).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
    assert "named.parquet" in refusal(lambda: texts.load(parquet(tmp_path / "named.parquet", named)))
    # One text of a thousand letters, said ten thousand times: 10 MB in a file of a few KB.
    large = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(10_000, np.int32)), pyarrow.array(["x" * 1000]))
    config = parquet(tmp_path / "large.parquet", pyarrow.table({"text": large, "label": np.zeros(10_000, np.int64)}))
    assert Path(config.source).stat().st_size < 100_000
    monkeypatch.setattr(hub, "_MOST_BYTES", 5 << 20)
    assert "at most 5,242,880 bytes" in refusal(lambda: texts.load(config))


# --- configurations ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "empty": (b"", "got an empty file"),
    "only a comment": (b"# nothing\n", "got an empty file"),
    "only a heading": (b"[run]\n", "got an empty file"),
    "a key of 400,000 parts": (b"a." * 400_000 + b"a = 1", "keys of at most 100 parts"),
    "a heading of 400,000 parts": (b"[a" + b".a" * 400_000 + b"]", "keys of at most 100 parts"),
    "a number of 20,000 bits": (b"[run]\nrounds = 0x" + b"f" * 5000, "at most 64 bits"),
    "a number of 5,000 digits": (b"[run]\nrounds = " + b"9" * 5000, "not readable as TOML"),
    "a number too large for a float": (b"[train]\nlearning_rate = 0x" + b"f" * 400, "at most 64 bits"),
    "an infinite number": (b"[train]\nlearning_rate = inf", "expected a finite number, got inf"),
    "no number": (b"[train]\nlearning_rate = nan", "expected a finite number, got nan"),
    "lists 100,000 deep": (b"[run]\nname = " + b"[" * 100_000, "nested too deep"),
    "lists 200 deep": (b"[run]\nname = " + b"[" * 200 + b"]" * 200, "nested more than 32 deep"),
    "a section that is a number": (b"run = 1", "expected a table"),
    "a section that is a list": (b"[[run]]\nname = 'a'", "expected a table"),
    "a date": (b"[run]\nname = 2020-01-01", "expected string"),
    "latin-1": (b"[run]\nname = 'caf\xe9'", "not readable as TOML"),
    "a megabyte and more": (b"#" * (1 << 20) + b"\n", "at most 1,048,576 bytes"),
    "an empty source": (b"[data]\nsource = ''", "data.source"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    content, says = CONFIGS[case]
    (tmp_path / "run.toml").write_bytes(content)
    assert says in refusal(lambda: load(tmp_path / "run.toml"), whole=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "run." + "a." * 5000 + "a=1",
        "run.rounds=0x" + "f" * 5000,
        "run.name=" + "[" * 5000,
        "run.name.x=1",
        "data.source=",
        "x=1",
    ],
)
def test_overrides_are_held_to_the_same(text: str) -> None:
    told = refusal(lambda: override(Config(), [text]))
    assert len(told) <= LONGEST


def test_a_source_of_any_length_is_left_to_its_reader(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f"[data]\nsource = '{'x' * 5000}'\n")
    assert load(tmp_path / "run.toml").data.source == "x" * 5000


def test_an_empty_configuration_ends_the_command_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    command = [sys.executable, "-m", "anyrank", "run", "run.toml", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("anyrank: run.toml: expected a configuration, got an empty file")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["run", "\x1b[31m.toml"], ["\x1b[31m"], ["run", "a.toml", "--\x1b[31m"], ["inspect", "\u202e"]]
)
def test_no_escape_of_the_command_line_comes_back_from_an_error(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anyrank", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 2
    told = done.stderr.decode()
    assert told == printable(told.rstrip("\n")) + "\n"


def test_the_configuration_of_a_run_is_read_within_the_same_bounds(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"a." * 400_000 + b"a = 1")
    assert "keys of at most 100 parts" in refusal(lambda: RunDir.check(tmp_path, Config(), resume=True), whole=tmp_path)


# --- reports -----------------------------------------------------------------------------------------------------------

REPORTED = {
    "a round of 400 digits": ("metrics.jsonl", b'{"round": 1' + b"0" * 400 + b"}\n"),
    "a round below 0": ("metrics.jsonl", b'{"round": -5}\n{"round": 1e300}\n{"round": NaN}\n'),
    "a spectrum that is a number": ("metrics.jsonl", b'{"round": 1, "spectrum": {"x": 3}}\n'),
    "a loss of 400 digits": ("metrics.jsonl", b'{"round": 1, "loss": 1' + b"0" * 400 + b"}\n"),
    "lines nested 100,000 deep": ("metrics.jsonl", b'{"a":' * 100_000 + b"\n"),
    "clients nested 500 deep": ("clients.jsonl", b'{"round": 1, "client": ' + b"[" * 500 + b"]" * 500 + b"}\n"),
    "ranks that are no numbers": ("summary.json", b'{"ranks": {"x": 1, "2": "y", "4": 3}}'),
    "a key of 400,000 parts": ("config.toml", b"a." * 400_000 + b"a = 1"),
    "a configuration nested 200 deep": ("config.toml", b"[run]\nname = " + b"[" * 200 + b"]" * 200),
    "a configuration with a number of 5,000 digits": ("config.toml", b"[run]\nrounds = " + b"9" * 5000),
}


@pytest.mark.parametrize("case", REPORTED)
def test_a_report_reads_what_is_readable_of_any_run_folder(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[run]\nname = "a"\n')
    name, content = REPORTED[case]
    (tmp_path / name).write_bytes(content)

    def read() -> Any:
        run = reports.read(tmp_path)
        return run.ranks, run.final("loss"), run.planned

    found = outcome(read, whole=tmp_path)
    assert not found.refusal
    if "ranks" in case:
        assert found.value[0] == {4: 3}


def test_a_summary_nested_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_bytes(b'{"a":' * 100_000)
    assert "expected one JSON object" in refusal(lambda: reports.read(tmp_path))
    with pytest.raises(RunError):
        read_object(tmp_path / "summary.json")


@pytest.mark.parametrize(
    "value", [2**63, -(2**63) - 1, hostile.nested(200), float("inf"), "\udcff", {"\ud800": 1}, ("\udcff",), None, object()]
)
def test_values_in_python_are_held_to_what_toml_holds(value: Any) -> None:
    for table in ({"run": {"name": value}}, {"lora": {"alpha": value}}, {"method": {"name": "rbla", "x": value}}):
        if value == float("inf") and "lora" not in table:
            continue  # TOML has infinite numbers; a key that takes numbers has not
        refusal(lambda table=table: from_table(table))

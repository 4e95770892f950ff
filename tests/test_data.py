"""Files become tables as they stand, or stop with one line that says where and how to mend it."""

import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from anyrank.config.sections import DataConfig, PartitionConfig
from anyrank.config.tables import from_table
from anyrank.data import partition, texts
from anyrank.errors import ConfigError, DataError


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def refusal(config, read=texts.load):
    """The one line that reading `config` raises."""
    with pytest.raises(DataError) as caught:
        read(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_csv_has_quotes_commas_and_line_breaks_inside_fields(tmp_path):
    source = write(tmp_path / "a.csv", 'text,label,user\r\n"one, ""two""\nthree",yes,u1\r\nplain, no ,u2\r\n')
    table = texts.load(DataConfig(source=source))
    assert table.texts == ('one, "two"\nthree', "plain")
    assert table.label_names == ("no", "yes")  # blanks around a label are dropped
    assert table.labels.tolist() == [1, 0]
    assert table.labels.dtype == np.int64
    assert table.columns["user"].tolist() == ["u1", "u2"]
    assert len(table) == 2


def test_tsv_quotes_are_part_of_the_text(tmp_path):
    source = write(tmp_path / "a.tsv", '"a" film\t1\nso-called "art\t0\n')
    table = texts.load(DataConfig(source=source, text=0, label=1, header=False))
    assert table.texts == ('"a" film', 'so-called "art')


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    csv = write(tmp_path / "a.csv", "text,label\nx,1\n", "utf-8-sig")
    lines = write(tmp_path / "a.jsonl", '{"text": "x", "label": 1}\n', "utf-8-sig")
    for source in (csv, lines):
        assert texts.load(DataConfig(source=source)).texts == ("x",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x", "label": true, "age": 3}\n\n{"text": "y", "label": false, "age": null, "more": 1}\n'),
        ("a.json", '[{"text": "x", "label": true, "age": 3}, {"text": "y", "label": false, "age": null, "more": 1}]'),
    ],
)
def test_json_lines_and_json_lists_read_alike(tmp_path, name, content):
    table = texts.load(DataConfig(source=write(tmp_path / name, content)))
    assert table.texts == ("x", "y")
    assert table.label_names == ("false", "true")  # as JSON spells them
    assert {name: column.tolist() for name, column in table.columns.items()} == {"age": ["3", ""]}  # only what all rows have


def test_whole_number_labels_are_in_order_of_value_others_by_alphabet(tmp_path):
    numbers = write(tmp_path / "a.csv", "text,label\na,10\nb,9\nc,-1\n")
    names = write(tmp_path / "b.csv", "text,label\na,10\nb,9\nc,x\n")
    assert texts.load(DataConfig(source=numbers)).label_names == ("-1", "9", "10")
    assert texts.load(DataConfig(source=names)).label_names == ("10", "9", "x")


def test_columns_go_by_number_without_a_header(tmp_path):
    source = write(tmp_path / "a.csv", '"3","title","body"\n"1","other","more"\n')
    table = texts.load(DataConfig(source=source, text=2, label=0, header=False))
    assert table.texts == ("body", "more")
    assert list(table.columns) == ["1"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("text,category\na,b\n", {}, ["no column 'label' for data.label", "'text', 'category'"]),
        ("texts,label\na,b\n", {}, ["did you mean 'texts'?"]),
        ("good film,1\nbad film,0\n", {}, ["data.header = false"]),
        ("text,label\na,b\nc\n", {}, ["line 3", "expected 2 columns, got 1"]),
        ('text,label\n"a\n\nb",x\nc,y,z\n', {}, ["line 5", "got 3"]),  # the record before spans three lines
        ("text,label\na,b\n\n  ,b\n", {}, ["line 4", "expected a text in column 'text', got an empty one"]),
        ("text,label\na,b\nc,\n", {}, ["line 3", "label", "got an empty one"]),
        ('text,label\na,b\n"c,d\n', {}, ["line 3", "not a valid row"]),  # the quote is never closed
        ("text,text\na,b\n", {}, ["column 'text' is there twice"]),
        ("", {}, ["an empty file"]),
        ("text,label\n", {}, ["expected rows of data, got none"]),
        ("a,b\n", {"header": False}, ["data.text: expected a column number", "got 'text'"]),
        ("a,b\n", {"header": False, "text": 0, "label": 2}, ["expected a column number from 0 to 1"]),
        ("a,b\n", {"header": False, "text": 1, "label": 1}, ["column '1' twice"]),
    ],
)
def test_a_bad_csv_stops_with_the_place_and_the_mend(tmp_path, content, options, says):
    said = refusal(DataConfig(source=write(tmp_path / "a.csv", content), **options))
    assert str(tmp_path / "a.csv") in said
    for part in says:
        assert part in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', ["line 2", "expected a label", "got none"]),
        ('{"text": "a", "label": 1}\n{"text": 5, "label": 1}\n', ["line 2", "expected a text", "got 5"]),
        ('{"text": "a", "label": 1.5}\n', ["line 1", "expected a label", "1.5"]),
        ('{"text": "a", "label": 1}\n\n{"text": \n', ["line 3", "one JSON object per line"]),
        ('{"text": "a", "label": 1}\n[1]\n', ["line 2", "got list"]),
        ('[{"text": "a", "label": 1}, 7]', ["item 2", "got int"]),
        ('[{"text": "a", "label": 1}, {"text": "", "label": 1}]', ["item 2", "an empty one"]),
        ('[{"text": "a"', ["not readable as JSON"]),
        ('{"Text": "a", "label": 1}\n', ["did you mean 'Text'?"]),
        ("[]", ["got none"]),
    ],
)
def test_bad_json_stops_with_the_place_and_the_mend(tmp_path, content, says):
    said = refusal(DataConfig(source=write(tmp_path / "a.jsonl", content)))
    for part in says:
        assert part in said


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert "no such file" in refusal(DataConfig(source=str(tmp_path / "none.csv")))
    assert "expected a file ending in .csv" in refusal(DataConfig(source=write(tmp_path / "a.xlsx", "x")))
    (tmp_path / "folder.csv").mkdir()
    assert "cannot read" in refusal(DataConfig(source=str(tmp_path / "folder.csv")))
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    assert "not UTF-8 text (byte 14" in refusal(DataConfig(source=str(tmp_path / "latin.csv")))


# --- held-out rows ---------------------------------------------------------------------------------------------------


def rows(counts):
    return "text,label,user\n" + "".join(f"{label} {i},{label},u{i % 3}\n" for label, n in counts.items() for i in range(n))


def test_the_split_keeps_every_label_in_proportion_and_every_row_once(tmp_path):
    config = DataConfig(source=write(tmp_path / "a.csv", rows({"a": 50, "b": 25, "c": 5})), test_fraction=0.2)
    train, test = texts.load_split(config)
    assert Counter(test.labels.tolist()) == {0: 10, 1: 5, 2: 1}
    assert sorted(train.texts + test.texts) == sorted(texts.load(config).texts)
    assert train.label_names == test.label_names == ("a", "b", "c")
    assert len(train.columns["user"]) == len(train)
    again = texts.load_split(config)[1]
    assert again.texts == test.texts  # there is no seed to change it


def test_a_label_with_one_row_stays_in_training(tmp_path):
    config = DataConfig(source=write(tmp_path / "a.csv", rows({"a": 1, "b": 9})), test_fraction=0.9)
    train, test = texts.load_split(config)
    assert set(train.labels.tolist()) == {0, 1}
    assert test.labels.tolist() == [1] * 8  # nine rows are asked for; each label keeps one


def test_a_split_with_nothing_to_hold_out_is_refused(tmp_path):
    config = DataConfig(source=write(tmp_path / "a.csv", rows({"a": 1, "b": 1})))
    assert "test_fraction" in refusal(config, texts.load_split)


def test_one_label_is_nothing_to_learn(tmp_path):
    config = DataConfig(source=write(tmp_path / "a.csv", rows({"only": 5})))
    assert "at least two different labels" in refusal(config, texts.load_split)


def test_a_test_file_has_the_training_files_labels(tmp_path):
    source = write(tmp_path / "a.csv", rows({"a": 2, "b": 2}))
    known = DataConfig(source=source, test_source=write(tmp_path / "b.csv", rows({"b": 1})))
    train, test = texts.load_split(known)
    assert (len(train), test.labels.tolist()) == (4, [1])  # b is label 1 though alone in its file
    unknown = DataConfig(source=source, test_source=write(tmp_path / "c.csv", rows({"b": 1, "new": 1})))
    assert "label 'new' is not among the 2 labels" in refusal(unknown, texts.load_split)


# --- splits, pairs and names -----------------------------------------------------------------------------------------

CLINC = {
    "train": [["tell me a joke", "tell_joke"], ["move money", "transfer"]],
    "oos_train": [["how tall is it", "oos"]],
    "test": [["another joke", "tell_joke"]],
}


def test_a_json_object_of_splits_gives_the_splits_that_are_named(tmp_path):
    source = write(tmp_path / "a.json", json.dumps(CLINC, indent=1))
    train, test = texts.load_split(DataConfig(source=source, test_split="test"))
    assert train.texts == ("tell me a joke", "move money")  # the split called train, where none is named
    assert (test.texts, test.label_names[test.labels[0]]) == (("another joke",), "tell_joke")
    both = texts.load(DataConfig(source=source, split="train+oos_train"))
    assert both.texts == ("tell me a joke", "move money", "how tall is it")
    assert both.label_names == ("oos", "tell_joke", "transfer")
    other = DataConfig(source=write(tmp_path / "b.csv", "text,label\na,tell_joke\nb,transfer\n"), test_source=source)
    assert texts.load_split(other)[1].texts == ("another joke",)  # of a test source, the split called test


def test_splits_may_hold_objects_with_columns(tmp_path):
    rows = {"train": [{"text": "a", "label": "x", "site": 1}, {"text": "b", "label": "y", "site": 2, "more": 0}]}
    table = texts.load(DataConfig(source=write(tmp_path / "a.json", json.dumps(rows))))
    assert {name: column.tolist() for name, column in table.columns.items()} == {"site": ["1", "2"]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "tran"}, ["data.split", "has no split 'tran'", "did you mean 'train'?"]),
        ({"split": "train+val"}, ["no split 'val'"]),
        ({"test_split": "tests"}, ["data.test_split", "did you mean 'test'?"]),
        ({"split": "bad"}, ["split bad, item 2", "a pair [text, label]", "got list"]),
        ({"split": "empty"}, ["split empty", "expected rows of data, got none"]),
        ({"text": "sentence"}, ["split train", "no column 'sentence' for data.text"]),
    ],
)
def test_splits_that_cannot_be_are_named(tmp_path, options, says):
    splits = CLINC | {"bad": [["a", "b"], ["a", "b", "c"]], "empty": []}
    said = refusal(DataConfig(source=write(tmp_path / "a.json", json.dumps(splits)), **options), texts.load_split)
    for part in says:
        assert part in said


def test_a_source_without_splits_takes_none(tmp_path):
    source = write(tmp_path / "a.csv", "text,label\na,x\nb,y\n")
    assert "has no splits; leave it out" in refusal(DataConfig(source=source, split="train"))
    assert "data.test_split = 'test'" in refusal(DataConfig(source=source, test_split="test"), texts.load_split)


def test_two_text_columns_are_pairs(tmp_path):
    source = write(tmp_path / "a.csv", "question,passage,label\nq1,p1,yes\nq2,p2,no\n")
    table = texts.load(DataConfig(source=source, text=("question", "passage")))
    assert table.texts == (("q1", "p1"), ("q2", "p2"))
    assert table.columns == {}
    numbered = write(tmp_path / "b.csv", '3,"title","body"\n')
    assert texts.load(DataConfig(source=numbered, text=(1, 2), label=0, header=False)).texts == (("title", "body"),)
    assert "no column 'answer'" in refusal(DataConfig(source=source, text=("question", "answer")))
    assert "'question' twice" in refusal(DataConfig(source=source, text=("question", "question")))


def test_pairs_are_two_and_come_from_toml_as_a_list():
    assert from_table({"data": {"text": ["a", 1]}}).data.text == ("a", 1)
    with pytest.raises(ConfigError, match="data.text: expected one column, or a list of two"):
        from_table({"data": {"text": ["a", "b", "c"]}})


def test_labels_get_other_names_in_their_order(tmp_path):
    source = write(tmp_path / "a.tsv", "bad\t10\ngood\t9\n")
    table = texts.load(DataConfig(source=source, text=0, label=1, header=False, label_names=("nine", "ten")))
    assert [table.label_names[label] for label in table.labels] == ["ten", "nine"]
    for names in (("nine",), ("nine", "nine")):
        config = DataConfig(source=source, text=0, label=1, header=False, label_names=names)
        assert "expected 2 different names, for '9', '10'" in refusal(config)


# --- Parquet and datasets --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`{kind: source}`: the same three rows as Parquet with and without class names, and as `datasets` saves them."""
    datasets = pytest.importorskip("datasets")
    root, value = tmp_path_factory.mktemp("saved"), datasets.Value("string")
    kinds = {"text": value, "label": datasets.ClassLabel(names=["neg", "pos"]), "user": value, "site": value, "words": [value]}
    values = {"text": ["a", "b", "c"], "label": [1, 0, 1], "user": ["u1", None, "u2"], "site": ["s", "t", "s"]}
    values["words"] = [["a"], ["b"], ["c"]]
    rows = datasets.Dataset.from_dict(values, features=datasets.Features(kinds))
    unlabelled = datasets.Dataset.from_dict(values | {"label": [1, -1, 0]}, features=datasets.Features(kinds))
    datasets.disable_progress_bars()
    rows.to_parquet(root / "named.parquet")
    datasets.Dataset.from_dict(values).to_parquet(root / "plain.parquet")
    rows.select([2, 0, 1]).save_to_disk(root / "single")
    datasets.DatasetDict(train=rows, validation=rows.select([1]), test=unlabelled).save_to_disk(root / "splits")
    (root / "files" / "data").mkdir(parents=True)
    rows.to_parquet(root / "files" / "data" / "train-00000-of-00001.parquet")
    rows.select([0]).to_parquet(root / "files" / "data" / "test-00000-of-00001.parquet")
    datasets.enable_progress_bars()
    return {path.name: str(path) for path in root.iterdir()}


def rows_of(table):
    return [(text, table.label_names[label]) for text, label in zip(table.texts, table.labels, strict=True)]


def test_parquet_and_saved_datasets_are_tables(saved, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)  # of what is read from files as the hub has them
    expected = [("a", "pos"), ("b", "neg"), ("c", "pos")]
    assert rows_of(texts.load(DataConfig(source=saved["named.parquet"]))) == expected
    assert rows_of(texts.load(DataConfig(source=saved["plain.parquet"]))) == [("a", "1"), ("b", "0"), ("c", "1")]
    assert rows_of(texts.load(DataConfig(source=saved["single"]))) == [expected[2], *expected[:2]]
    train, test = texts.load_split(DataConfig(source=saved["splits"], test_split="validation"))
    assert (rows_of(train), rows_of(test)) == (expected, [("b", "neg")])
    assert train.columns["user"].tolist() == ["u1", "", "u2"]
    assert list(train.columns) == ["user", "site"]  # a column of lists is none of plain values
    train, test = texts.load_split(DataConfig(source=saved["files"], test_split="test"))
    assert (rows_of(train), rows_of(test)) == (expected, [("a", "pos")])
    assert capfd.readouterr().out == ""


def test_a_row_of_a_dataset_without_a_label_is_named(saved):
    said = refusal(DataConfig(source=saved["splits"], split="test"))
    assert "split test, row 1: expected a label" in said
    assert "no split 'tests'" in refusal(DataConfig(source=saved["splits"], split="tests"))
    assert "did you mean 'text'?" in refusal(DataConfig(source=saved["single"], text="txt"))


def test_damaged_files_and_folders_of_no_dataset_are_one_line(saved, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    for name in ("cut.parquet", "empty"):
        assert f"{name}: datasets cannot open it (" in refusal(DataConfig(source=str(tmp_path / name)))


def test_a_hub_id_is_opened_with_its_configuration(saved, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return datasets.load_from_disk(saved["splits"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(texts.load(DataConfig(source="owner/reviews"))) == 3
    assert len(texts.load(DataConfig(source="glue:sst2", split="validation"))) == 1
    assert asked == [("owner/reviews", None), ("glue", "sst2")]


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(name, config):
        raise ConnectionError(f"cannot reach {name}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    said = refusal(DataConfig(source="owner/reviews"))
    assert "owner/reviews: datasets cannot open it (ConnectionError: cannot reach owner/reviews); check the name" in said


def test_without_datasets_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'anyrank[hub]'" in refusal(DataConfig(source=saved["named.parquet"]))


def test_a_column_of_any_source_says_whose_a_row_is(saved, tmp_path):
    as_json = [{"text": str(i), "label": i % 2, "site": f"u{i % 3}"} for i in range(9)]
    for source in (write(tmp_path / "a.json", json.dumps({"train": as_json})), saved["splits"]):
        table = texts.load(DataConfig(source=source))
        split = PartitionConfig(kind="column", column="site")
        owners = sorted(set(table.columns["site"]))
        shards = partition.partition(split, table.labels, len(owners), 0, table.columns)
        held = [{table.columns["site"][i] for i in shards[client]} for client in range(len(owners))]
        assert sorted(name for names in held for name in names) == owners  # every client one owner, every owner one client


# --- real files ------------------------------------------------------------------------------------------------------


def test_banking77_reads_whole(shared_data):
    folder = shared_data / "banking77"
    config = DataConfig(source=str(folder / "train.csv"), test_source=str(folder / "test.csv"), label="category")
    train, test = texts.load_split(config)
    assert (len(train), len(test)) == (10_003, 3_080)
    assert sorted(train.label_names) == sorted(json.loads((folder / "categories.json").read_text()))
    assert set(np.bincount(test.labels)) == {40}
    assert any("\n" in text for text in train.texts)  # some texts hold line breaks
    said = refusal(DataConfig(source=str(folder / "train.csv")))
    assert "'text', 'category'" in said


def test_sst2_reads_whole_without_a_header(shared_data):
    folder = shared_data / "sst2"
    config = DataConfig(source=str(folder / "train.tsv"), test_source=str(folder / "dev.tsv"), text=0, label=1, header=False)
    train, test = texts.load_split(config)
    assert (len(train), len(test), train.label_names) == (6_920, 872, ("0", "1"))


def test_ag_news_and_gsm8k_read_whole(shared_data):
    news = DataConfig(source=str(shared_data / "ag_news_test" / "test.csv"), text=2, label=0, header=False)
    assert np.bincount(texts.load(news).labels).tolist() == [1900] * 4
    sums = DataConfig(source=str(shared_data / "gsm8k" / "test.jsonl"), text="question", label="answer")
    assert len(texts.load(sums)) == 1_319


def test_clinc150_reads_whole_from_its_own_file(shared_data):
    config = DataConfig(source=str(shared_data / "clinc150" / "data_full.json"), test_split="test")
    train, test = texts.load_split(config)
    assert (len(train), len(test), len(train.label_names)) == (15_000, 4_500, 150)
    with_unknown = texts.load(replace(config, split="train+oos_train"))
    assert (len(with_unknown), len(with_unknown.label_names)) == (15_100, 151)

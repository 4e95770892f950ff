"""`[data]` and `[data.partition]`: the examples, and how they are divided among clients."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from anyrank.config.describe import COUNT, LATER, NATURAL, NOT_NEGATIVE, POSITIVE, key
from anyrank.config.sections.model import HANDED_IN
from anyrank.config.sections.values import expect, one_of

PARTITIONS = ("iid", "dirichlet", "pathological", "staircase", "quantity", "column", "sampled")
INSTRUCTIONS = ("columns", "messages", "gsm8k", "commonsense")
_NO_DELIMITERS = ('"', "\r", "\n", "\0", "\ufeff")
_NO_ENCODINGS = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "oem")  # not of whole texts


@dataclass(frozen=True)
class PartitionConfig:
    """`[data.partition]`: how training examples are divided among clients."""

    kind: str = key(
        "dirichlet",
        "How examples are divided: evenly (iid), with skewed labels (dirichlet), with a few labels per client (pathological), "
        "with more labels for later clients (staircase), in skewed amounts (quantity) or by a column (column). sampled: no "
        "split; each client draws examples_per_client of all examples, with label skew alpha, when it first takes part. Or "
        "the name of a partition that data.partition.file registers.",
        PARTITIONS,
        {"flwr-datasets": "IidPartitioner, DirichletPartitioner, PathologicalPartitioner, NaturalIdPartitioner"},
    )
    alpha: float = key(
        0.5, "Evenness of dirichlet, quantity and sampled: the smaller the value, the more the clients differ.", POSITIVE
    )
    labels_per_client: int = key(
        2, "Number of labels per client, for pathological.", COUNT, {"flwr-datasets": "num_classes_per_partition"}
    )
    column: str = key(
        "",
        "The column whose values are the clients, for column.",
        "the name of a column; only with kind = 'column'",
        {"flwr-datasets": "partition_by"},
    )
    examples_per_client: int = key(
        0, "Number of examples that each client draws, for sampled.", f"{COUNT}, only with kind = 'sampled'; else 0"
    )
    min_examples: int = key(
        1,
        "Minimum number of examples per client; a split that gives a client fewer is an error.",
        NATURAL,
        {"flwr-datasets": "min_partition_size"},
    )
    file: str = key(
        "", "A Python file that registers your own partition under the name in data.partition.kind.", metadata=LATER
    )
    handed_in: str = key(
        "", "Digest of shards that were passed from Python. Written automatically; do not set it by hand.", metadata=LATER
    )

    def __post_init__(self) -> None:
        if not self.file and self.kind != HANDED_IN:
            one_of(self.kind, PARTITIONS, "data.partition.kind")
        expect((self.kind == HANDED_IN) == bool(self.handed_in), "data.partition.kind", "a partition's name", self.kind)
        expect(self.alpha > 0, "data.partition.alpha", POSITIVE, self.alpha)
        expect(self.labels_per_client >= 1, "data.partition.labels_per_client", "at least 1", self.labels_per_client)
        expect(self.min_examples >= 0, "data.partition.min_examples", NOT_NEGATIVE, self.min_examples)
        wanted = "at least 1 with kind = 'sampled', and 0 with any other kind"
        sampled = self.kind == "sampled"
        right = self.examples_per_client >= 1 if sampled else self.examples_per_client == 0
        expect(right, "data.partition.examples_per_client", wanted, self.examples_per_client)
        fits = bool(self.column) == (self.kind == "column") or bool(self.file)
        expect(fits, "data.partition.column", "a column with kind = 'column', and no column with any other kind", self.column)


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: the examples, the columns that are read, and the examples that are held out."""

    source: str = key(
        "digits",
        "The training examples: digits; texts and rows as CSV, TSV, JSON, Parquet, or a dataset on disk or on the hub; images "
        "as IDX, .npz, folders or datasets. A relative path starts at the folder of the configuration; if it is not there, at "
        "$ANYRANK_DATA. A list of files, or a pattern such as sites/*.csv for tables in one folder, makes a client of "
        "each file, as [[sites]] do: with the file's name, and the ranks of clients.ranks in order.",
        also={"datasets": "data_files"},
    )
    test_source: str = key("", "The held-out examples, if they have a source of their own; read in the same way as source.")
    test_fraction: float = key(
        0.2,
        "Share of the source that is held out, if neither test_source nor test_split is set.",
        "a number between 0 and 1",
        {"datasets": "test_size"},
    )
    split: str = key("", "The split of the source to train on, if it has splits.")
    test_split: str = key("", "The split of the source that is held out, if it has splits.")
    text: str | int | tuple[str | int, ...] = key(
        "text",
        "The column of texts, or a list of two columns for pairs of texts: names, or numbers from 0 if data.header is false.",
        "a column, or a list of two",
        {"transformers": "sentence1_key, sentence2_key"},
    )
    image: str = key("image", "The array or column of images.")
    label: str | int = key(
        "label",
        "The column or array of labels: a name, or a number from 0 if data.header is false.",
        also={"flwr-datasets": "partition_by"},
    )
    person: str = key(
        "",
        "The column that names whose each example is, for privacy.level = 'person'; if data.header is false, its number as "
        "text. Where the held-out examples are a share of the source, all examples of a person are held out, or none.",
        "the name of a column",
    )
    label_names: tuple[str, ...] = key(
        (),
        "Other names for the labels of texts, in the order of the labels. With [[sites]], of any examples: also the labels "
        "themselves, of which each site may have some only; they are then numbered in this order, whatever sites there are.",
    )
    header: bool = key(
        True, "Whether the first row of a table has the names of its columns. false: columns are numbered from 0."
    )
    delimiter: str = key(
        "",
        "The character between the columns of a table. Empty: a comma in .csv files, a tab in .tsv files.",
        "one character, or empty",
        {"datasets": "sep"},
        LATER,
    )
    encoding: str = key(
        "utf-8",
        "The encoding of text files: utf-8, utf-16, latin-1, cp1252, or another one that Python knows.",
        "the name of a text encoding",
        metadata=LATER,
    )
    format: str = key(
        "columns",
        "What the rows of a causal-lm source contain: a prompt and a completion in columns, chat messages, or the columns of "
        "a known data set.",
        INSTRUCTIONS,
    )
    prompt: str = key("prompt", "The column of prompts, for format = 'columns'.")
    completion: str = key("completion", "The column of completions, for format = 'columns'; only these have a loss.")
    template: str = key("", "The training text, with fields in braces. Empty: the format's own template.")
    chat: bool = key(
        False,
        "Whether the tokenizer's chat template makes the training text.",
        also={"transformers": "apply_chat_template"},
    )
    options: tuple[str, ...] = key((), "The completions to choose from.")
    rotate: int = key(0, "Degrees by which images are rotated counterclockwise.", "0, 90, 180 or 270")
    train_examples: int = key(
        0, "Number of examples to train on, drawn at random. 0: all.", NATURAL, {"transformers": "max_train_samples"}
    )
    test_examples: int = key(
        0, "Number of held-out examples to score on, drawn at random. 0: all.", NATURAL, {"transformers": "max_eval_samples"}
    )
    partition: PartitionConfig = field(default_factory=PartitionConfig)

    def __post_init__(self) -> None:
        expect(0 < self.test_fraction < 1, "data.test_fraction", "a number between 0 and 1", self.test_fraction)
        pair = not isinstance(self.text, tuple) or len(self.text) == 2
        expect(pair, "data.text", "one column, or a list of two for pairs of texts", self.text)
        expect(bool(self.source), "data.source", "a file, a folder, a dataset on the hub or digits", self.source)
        one_of(self.format, INSTRUCTIONS, "data.format")
        delimiter = len(self.delimiter) <= 1 and self.delimiter not in _NO_DELIMITERS
        expect(delimiter, "data.delimiter", "one character that is no quote and no line break, or none", self.delimiter)
        expect(_is_encoding(self.encoding), "data.encoding", "a text encoding, such as utf-8 or latin-1", self.encoding)
        expect(self.rotate in (0, 90, 180, 270), "data.rotate", "0, 90, 180 or 270 degrees", self.rotate)
        expect(self.train_examples >= 0, "data.train_examples", NATURAL, self.train_examples)
        expect(self.test_examples >= 0, "data.test_examples", NATURAL, self.test_examples)


def _is_encoding(name: str) -> bool:
    """Whether Python knows a text encoding of this name that reads the letters of a table."""
    try:
        known = codecs.lookup(name).name.replace("-", "_")
        return known not in _NO_ENCODINGS and "a,b\n".encode(name).decode(name) == "a,b\n"
    except (LookupError, ValueError):
        return False

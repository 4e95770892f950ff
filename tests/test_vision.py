"""Images of any source reach a model as it expects them, and what is learned on them is an adapter that PEFT takes."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anyrank import devices, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config, DataConfig, LoraConfig, ModelConfig
from anyrank.config.tables import from_table
from anyrank.data import images
from anyrank.data.partition import partition
from anyrank.errors import ConfigError, DataError, ModelError
from anyrank.federation.federation import Federation
from anyrank.messages.records import Scaling
from anyrank.tasks import frozen
from anyrank.tasks.base import Task
from anyrank.tasks.load import _cached_task
from anyrank.tasks.vision import classifier, prefix, small
from anyrank.tasks.vision import task as vision
from anyrank.training.lora import LoraModel

transformers = pytest.importorskip("transformers")

FASHION = Path("/usr/share/datasets/fashion-mnist")
DRAW = np.random.default_rng(0)
GREY = DRAW.integers(0, 256, (24, 12, 8), dtype=np.uint8)
COLOUR = DRAW.integers(0, 256, (24, 12, 8, 3), dtype=np.uint8)
LABELS = np.arange(24, dtype=np.uint8) % 3
NAMES = ("cat", "dog", "elk")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 1)


# --- sources ---------------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    """The IDX file of an array of bytes, as its inventors describe it."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_idx(folder: Path, part: str, pictures=GREY, labels=LABELS, packed=False) -> Path:
    folder.mkdir(exist_ok=True)
    for what, values in (("images-idx3", pictures), ("labels-idx1", labels)):
        name, data = f"{part}-{what}-ubyte", idx(values)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return folder


def write_pictures(root: Path, pictures=COLOUR, labels=LABELS) -> Path:
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        (root / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / NAMES[label] / f"{i:02d}.png")
    return root


def png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "png")
    return data.getvalue()


def dataset(pictures=COLOUR, labels=LABELS, names=NAMES):
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names)), "writer": datasets.Value("string")}
    rows = {"image": [{"bytes": png(each), "path": None} for each in pictures], "label": labels.tolist()}
    return datasets.Dataset.from_dict(
        rows | {"writer": [f"w{i % 4}" for i in range(len(labels))]}, features=datasets.Features(kinds)
    )


def pixels(found: images.Images) -> np.ndarray:
    return np.stack(list(found))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_as_they_were_written(tmp_path, packed):
    write_idx(tmp_path, "train", packed=packed)
    write_idx(tmp_path, "t10k", GREY[:6], LABELS[:6], packed)
    train, test = images.load_split(DataConfig(source=str(tmp_path)))
    assert np.array_equal(pixels(train), GREY)
    assert np.array_equal(pixels(test), GREY[:6])
    assert train.labels.tolist() == LABELS.tolist()
    assert train.label_names == ("0", "1", "2")


def test_idx_folders_of_held_out_images_alone_are_a_test_source(tmp_path):
    write_idx(tmp_path / "a", "train")
    write_idx(tmp_path / "b", "test", GREY[:5], LABELS[:5])
    _, test = images.load_split(DataConfig(source=str(tmp_path / "a"), test_source=str(tmp_path / "b")))
    assert np.array_equal(pixels(test), GREY[:5])
    with pytest.raises(DataError, match="no split 'train' for data.split; known: test"):
        images.load_split(DataConfig(source=str(tmp_path / "b")))


@pytest.mark.parametrize("pictures", [GREY, COLOUR, GREY[..., None]], ids=["grey", "colour", "one channel"])
def test_npz_arrays_are_found_by_name(tmp_path, pictures):
    held_out = {"x_test": pictures[:4], "y_test": LABELS[:4, None]}
    np.savez(tmp_path / "set.npz", x_train=pictures, y_train=LABELS, site=np.repeat(["n", "s"], 12), **held_out)
    config = DataConfig(source=str(tmp_path / "set.npz"), image="x_train", label="y_train")
    train, test = images.load_split(config)
    assert np.array_equal(pixels(train), pictures.squeeze(-1) if pictures.shape[-1] == 1 else pictures)
    assert test.labels.tolist() == LABELS[:4].tolist()
    assert train.columns["site"].tolist() == ["n"] * 12 + ["s"] * 12


def test_folders_of_pictures_are_classes_by_the_alphabet(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    train, test = images.load_split(DataConfig(source=str(tmp_path), test_fraction=0.25))
    assert train.label_names == NAMES
    assert (len(train), len(test)) == (18, 6)
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]  # a quarter of each label
    read = sorted(each.tobytes() for part in (train, test) for each in part)
    assert read == sorted(each.tobytes() for each in COLOUR)  # every picture once, as it was saved


def test_a_folder_may_hold_its_own_splits(tmp_path):
    write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "val", COLOUR[:3], LABELS[:3])
    train, test = images.load_split(DataConfig(source=str(tmp_path)))
    assert (len(train), len(test)) == (24, 3)
    assert np.array_equal(pixels(test), COLOUR[:3])


def test_clients_are_the_values_of_a_column(tmp_path):
    write_pictures(tmp_path)
    rows = [f"{path.relative_to(tmp_path).as_posix()},w{int(path.stem) % 4}" for path in sorted(tmp_path.glob("*/*.png"))]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,writer", *rows]))
    train, _ = images.load_split(DataConfig(source=str(tmp_path)))
    config = from_table({"data": {"source": str(tmp_path), "partition": {"kind": "column", "column": "writer"}}})
    shards = partition(config.data.partition, train.labels, 4, 0, train.columns)
    for client, shard in enumerate(shards):
        assert {int(Path(train.where(i)).stem) % 4 for i in shard} == {client}


@pytest.mark.parametrize("kind", ["saved", "parquet file", "parquet folder"])
def test_datasets_are_read_wherever_they_lie(tmp_path, kind, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "set"
    if kind == "saved":
        datasets.DatasetDict(train=dataset(), test=dataset(COLOUR[:3], LABELS[:3])).save_to_disk(path)
    elif kind == "parquet file":
        path = tmp_path / "set.parquet"
        dataset().to_parquet(path)
    else:
        path.mkdir()
        dataset().to_parquet(path / "train-00000-of-00001.parquet")
        dataset(COLOUR[:3], LABELS[:3]).to_parquet(path / "test-00000-of-00001.parquet")
    train, test = images.load_split(DataConfig(source=str(path), test_fraction=0.25))
    assert train.label_names == NAMES
    assert (len(train), len(test)) == ((18, 6) if kind == "parquet file" else (24, 3))
    assert sorted(np.unique(train.columns["writer"])) == ["w0", "w1", "w2", "w3"]
    if kind != "parquet file":
        assert np.array_equal(pixels(train), COLOUR)


def test_limits_keep_the_same_examples_for_everybody(tmp_path):
    np.savez(tmp_path / "set.npz", image=GREY, label=LABELS)
    whole, limited = DataConfig(source=str(tmp_path / "set.npz")), DataConfig(source=str(tmp_path / "set.npz"), test_examples=2)
    assert len(images.load_split(limited)[1]) == 2
    kept = images.load_split(limited)[1].rows
    assert kept.tolist() == images.load_split(limited)[1].rows.tolist()
    assert set(kept) < set(images.load_split(whole)[1].rows)
    with pytest.raises(DataError, match="data.test_examples = 9: the source has only 5"):
        images.load_split(DataConfig(source=str(tmp_path / "set.npz"), test_examples=9))


def test_grey_palette_and_transparent_pictures_are_what_they_show(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Image.fromarray(GREY[0]).save(tmp_path / "a" / "0.png")
    flat = np.full((4, 4, 3), (200, 40, 10), dtype=np.uint8)
    Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "b" / "0.png")
    Image.fromarray(np.dstack([flat, np.full((4, 4), 255, np.uint8)])).save(tmp_path / "b" / "1.png")
    train, test = images.load_split(DataConfig(source=str(tmp_path)))
    found = {Path(part.where(i)).parts[-2:]: read for part in (train, test) for i, read in enumerate(part)}
    assert np.array_equal(found["a", "0.png"], GREY[0])
    assert np.array_equal(found["b", "0.png"], flat)
    assert np.array_equal(found["b", "1.png"], flat)


# --- what is wrong with a source -------------------------------------------------------------------------------------


def spoil(folder: Path, name: str, data: bytes) -> Path:
    write_idx(folder, "train")
    (folder / name).write_bytes(data)
    return folder


def broken_npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "set.npz", **arrays)
    return folder / "set.npz"


def broken_picture(folder: Path, data: bytes) -> Path:
    write_pictures(folder)
    (folder / "cat" / "00.png").write_bytes(data)
    return folder


def with_metadata(folder: Path, text: str) -> Path:
    write_pictures(folder)
    (folder / "metadata.csv").write_text(text)
    return folder


def with_empty_class(folder: Path) -> Path:
    write_pictures(folder)
    (folder / "fox").mkdir()
    return folder


def two_idx_sets(folder: Path) -> Path:
    write_idx(folder, "train")
    return write_idx(folder, "letters-train")


IMAGES, IDX_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
WRONG = {
    "wrong magic": (lambda f: spoil(f, IMAGES, b"\x00\x00\x0d\x03" + bytes(12)), "begins 00 00 08 03, got 00 00 0d 03"),
    "labels for images": (lambda f: spoil(f, IMAGES, idx(LABELS)), "begins 00 00 08 03, got 00 00 08 01"),
    "empty idx": (lambda f: spoil(f, IMAGES, b""), "got nothing"),
    "idx cut short": (lambda f: spoil(f, IMAGES, idx(GREY)[:-9]), "declares 24x12x8 bytes, but 2295 follow;"),
    "idx head cut short": (lambda f: spoil(f, IMAGES, idx(GREY)[:6]), "the file is damaged"),
    "gzip cut short": (lambda f: cut_gzip(f), "not readable as gzip"),
    "fewer labels": (lambda f: spoil(f, IDX_LABELS, idx(LABELS[:-1])), "expected 24 labels, one per image of .*, got 23"),
    "no labels": (lambda f: write_idx(f, "train").joinpath(IDX_LABELS).unlink() or f, "there is no file of its labels"),
    "two sets": (two_idx_sets, "belong to two datasets"),
    "not a zip": (lambda f: write_bytes(f / "set.npz", b"nothing"), "not readable as an .npz of plain arrays"),
    "objects": (lambda f: broken_npz(f, image=np.array([{}, []], dtype=object), label=LABELS[:2]), "npz of plain arrays"),
    "no such array": (lambda f: broken_npz(f, images=GREY, label=LABELS), "no array 'image' .*did you mean 'images'"),
    "floats": (lambda f: broken_npz(f, image=GREY / 255, label=LABELS), r"expected uint8 pixels .* got float64 \[24, 12, 8\]"),
    "channels first": (lambda f: broken_npz(f, image=COLOUR.swapaxes(1, 3), label=LABELS), r"got uint8 \[24, 3, 8, 12\]"),
    "one-hot labels": (lambda f: broken_npz(f, image=GREY, label=np.eye(24)), r"expected whole numbers or names \[n\]"),
    "fewer npz labels": (lambda f: broken_npz(f, image=GREY, label=LABELS[:5]), "expected 24 labels"),
    "one label": (lambda f: broken_npz(f, image=GREY, label=LABELS * 0), "at least two different labels, got only '0'"),
    "not a picture": (lambda f: broken_picture(f, b"no picture"), "cat/00.png: not readable as an image"),
    "picture cut short": (lambda f: broken_picture(f, png(COLOUR[0])[:60]), "cat/00.png: not readable as an image"),
    "16 bits": (
        lambda f: broken_picture(f, png(GREY[0].astype(np.uint16))),
        "expected 8 bits per channel, got mode I",
    ),
    "ragged": (lambda f: broken_picture(f, png(COLOUR[0, :5])), "expected .*x8 colour, as .* is, got .*x8 colour"),
    "grey among colour": (lambda f: broken_picture(f, png(GREY[0])), "expected 12x8 .*, as .* is, got 12x8 "),
    "empty class": (with_empty_class, "expected pictures .* of class 'fox', got none"),
    "empty folder": (lambda f: f, "expected a folder for each class"),
    "no file_name": (lambda f: with_metadata(f, "name,writer\na,b\n"), "expected a column 'file_name', got name, writer"),
    "unlisted picture": (lambda f: with_metadata(f, "file_name,writer\ncat/00.png,w\n"), "no row for cat/03.png .23 pictures"),
    "another file": (lambda f: write_bytes(f / "set.csv", b"a,b"), "expected images as a folder"),
    "no such file": (lambda f: f / "none.npz", "no such file or folder"),
}


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def cut_gzip(folder: Path) -> Path:
    write_idx(folder, "train", packed=True)
    file = folder / f"{IMAGES}.gz"
    file.write_bytes(file.read_bytes()[:-20])
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_source_is_one_line_that_says_where(tmp_path, case):
    make, says = WRONG[case]
    source = make(tmp_path)
    with pytest.raises(DataError, match=says) as error:
        read_all(DataConfig(source=str(source), test_fraction=0.1))
    assert "\n" not in str(error.value)


def read_all(config: DataConfig) -> list[np.ndarray]:
    return [part.stacked() for part in images.load_split(config)]


def test_held_out_labels_must_be_known(tmp_path):
    write_pictures(tmp_path / "a", COLOUR[:6], LABELS[:6] % 2)
    write_pictures(tmp_path / "b")
    with pytest.raises(DataError, match="label 'elk' of held-out images is not among the 2 labels"):
        images.load_split(DataConfig(source=str(tmp_path / "a"), test_source=str(tmp_path / "b")))


def test_wrong_columns_of_a_dataset_are_named(tmp_path):
    dataset().save_to_disk(tmp_path)
    with pytest.raises(DataError, match="no column 'img' for data.image; did you mean 'image'"):
        images.load_split(DataConfig(source=str(tmp_path), image="img"))
    with pytest.raises(DataError, match="expected a column of images, got 'writer'"):
        images.load_split(DataConfig(source=str(tmp_path), image="writer"))
    with pytest.raises(DataError, match="no split 'night' for data.split"):
        images.load_split(DataConfig(source=str(tmp_path), split="night"))


# --- embedded models -------------------------------------------------------------------------------------------------


def patterns(number: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of three kinds, a bright band above, in the middle and below, in noise: turned, the bands stand upright."""
    draw, labels = np.random.default_rng(1), np.arange(number) % 3
    pictures = draw.integers(0, 60, (number, size, size), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[label * size // 3 : (label + 1) * size // 3] += 150
    return pictures, labels


def bands(folder: Path, number: int = 360, **options) -> DataConfig:
    pictures, labels = patterns(number)
    np.savez(folder / "bands.npz", image=pictures, label=labels)
    return DataConfig(source=str(folder / "bands.npz"), **options)


def score(task: Task) -> float:
    return task.objective.score(task.module.eval(), task.test, 256).accuracy


def test_a_model_is_pretrained_upright_on_images_that_no_client_has(tmp_path):
    upright = vision.load(ModelConfig(name="fashion-mlp"), bands(tmp_path), LoraConfig(), tmp_path / "cache")
    turned = vision.load(ModelConfig(name="fashion-mlp"), bands(tmp_path, rotate=90), LoraConfig(), tmp_path / "cache")
    assert score(upright) > 0.9
    assert score(turned) < 0.7
    assert (len(turned.train), len(turned.test)) == (240, 72)  # 360, less a fifth held out, less a sixth of the others
    everything = {each.tobytes() for each in patterns(360)[0]}
    seen = [each.numpy()[0].tobytes() for part in (upright.train, upright.test) for each in part.inputs.values]
    assert len(set(seen)) == len(seen) == 312
    assert len(everything - set(seen)) == 48  # what it was pretrained on: nobody's
    first = upright.train.inputs.values[0, 0]
    assert torch.equal(turned.train.inputs.values[0, 0], first.T.flip(0))  # against the clock: the right side comes on top


def test_pretraining_happens_once_and_is_told(tmp_path, monkeypatch):
    told = []
    first = vision.load(
        ModelConfig(name="fashion-mlp"), bands(tmp_path), LoraConfig(), tmp_path, lambda *progress: told.append(progress)
    )
    assert told[-1] == (48 * 8, 48 * 8)
    monkeypatch.setattr("anyrank.tasks.vision.pretraining._train", lambda *_: pytest.fail("trained again"))
    again = vision.load(ModelConfig(name="fashion-mlp"), bands(tmp_path, train_examples=50), LoraConfig(), tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(first.module.parameters(), again.module.parameters(), strict=True))
    assert len(again.train) == 50


@pytest.mark.parametrize("name", small.MODELS)
def test_a_random_base_takes_images_of_any_size_and_colour(tmp_path, name):
    np.savez(tmp_path / "set.npz", image=COLOUR, label=LABELS)
    config = ModelConfig(name=name, pretrained=False)
    task = vision.load(config, DataConfig(source=str(tmp_path / "set.npz")), LoraConfig(), tmp_path)
    again = vision.load(config, DataConfig(source=str(tmp_path / "set.npz")), LoraConfig(), tmp_path)
    batch = task.test.inputs.batch(torch.arange(2))
    assert task.module(**batch).shape == (2, 3)
    assert torch.equal(task.module(**batch), again.module(**batch))
    assert len(task.train) == 19  # all but the held-out fifth: nothing is kept for pretraining
    assert "random frozen base" in task.name
    LoraModel(task).check_rank(32 if name != "fashion-vit" else 64)
    assert set(task.targets).isdisjoint({"head", "patch"})


@pytest.mark.parametrize("name", ["fashion-cnn", "fashion-vit"])
def test_adapted_small_models_compute_what_peft_computes(tmp_path, name):
    peft = pytest.importorskip("peft")
    data = bands(tmp_path)
    task = vision.load(ModelConfig(name=name, pretrained=False), data, LoraConfig(), tmp_path)
    batch = task.test.inputs.batch(torch.arange(5))
    with torch.no_grad():
        plain = task.module(**batch)
        adapter = moved(task)
        adapted = adapted_logits(task, adapter, batch)
        saved = adapter.save(tmp_path / "adapter")
        config = peft.LoraConfig.from_pretrained(saved)
        reloaded = peft.PeftModel.from_pretrained(task.module, saved, config=config).eval()
        torch.testing.assert_close(reloaded(**batch), adapted, atol=1e-4, rtol=1e-4)
    assert (adapted - plain).abs().max() > 0.01


def moved(task: Task, rank: int = 3) -> Adapter:
    """An adapter of the task with random factors, small enough to leave the logits finite."""
    model, draw = LoraModel(task), torch.Generator().manual_seed(1)
    start = model.start(rank, Scaling(2.0, "constant"), seed=0)
    model.close()
    factors = {
        name: layer.with_factors(layer.A, 0.1 * torch.randn(layer.B.shape, generator=draw))
        for name, layer in start.layers.items()
    }
    return Adapter(factors, start.tensors, start.config)


def adapted_logits(task: Task, adapter: Adapter, batch) -> torch.Tensor:
    model = LoraModel(task)
    try:
        model.apply(adapter)
        with torch.no_grad():
            return task.module(**batch)
    finally:
        model.close()


RANDOM_VIT = ModelConfig(name="fashion-vit", pretrained=False)


def test_a_small_models_wishes_are_checked(tmp_path):
    np.savez(tmp_path / "odd.npz", image=GREY[:, :10, :7], label=LABELS)
    with pytest.raises(ModelError, match="sides divisible by 4, got 10x7"):
        vision.load(RANDOM_VIT, DataConfig(source=str(tmp_path / "odd.npz")), LoraConfig(), tmp_path)
    np.savez(tmp_path / "few.npz", image=GREY[:6], label=LABELS[:6])
    with pytest.raises(DataError, match="too few to pretrain fashion-mlp"):
        vision.load(ModelConfig(name="fashion-mlp"), DataConfig(source=str(tmp_path / "few.npz")), LoraConfig(), tmp_path)
    with pytest.raises(ModelError, match="'fc7' matches nothing; did you mean 'fc"):
        vision.load(ModelConfig(name="fashion-mlp"), bands(tmp_path), LoraConfig(target_modules=("fc7",)), tmp_path)
    with pytest.raises(ConfigError, match="label-names is for text"):
        vision.load(ModelConfig(name="fashion-mlp", head="label-names"), bands(tmp_path), LoraConfig(), tmp_path)
    np.savez(tmp_path / "small.npz", image=GREY[:, :4, :4], label=LABELS)
    data = bands(tmp_path, test_source=str(tmp_path / "small.npz"))
    with pytest.raises(DataError, match="expected held-out images like the training images, 8x8 grey, got 4x4 grey"):
        vision.load(ModelConfig(name="fashion-mlp"), data, LoraConfig(), tmp_path)
    with pytest.raises(ConfigError, match="data.rotate: expected no value"):
        from_table({"data": {"rotate": 90}})
    with pytest.raises(ConfigError, match="model.pretrained: expected no value"):
        from_table({"model": {"pretrained": False}})


# --- federations -----------------------------------------------------------------------------------------------------


def federate(config: Config, tmp_path: Path, monkeypatch) -> dict:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    _cached_task.cache_clear()
    return simulation.execute(config, tmp_path / "run")


def test_a_federation_learns_to_see_turned_images(tmp_path, monkeypatch):
    bands(tmp_path)
    config = from_table(
        {
            "run": {"rounds": 6},
            "model": {"name": "fashion-cnn"},
            "data": {"source": str(tmp_path / "bands.npz"), "rotate": 90, "partition": {"kind": "iid"}},
            "clients": {"count": 4, "participation": 1.0, "ranks": [2, 8]},
        }
    )
    start = score(vision.load(config.model, config.data, config.lora, tmp_path / "cache"))
    assert federate(config, tmp_path, monkeypatch)["accuracy"] > start + 0.3


def test_rblas_setting_learns_from_a_random_network(tmp_path, monkeypatch):
    """Clients of rising rank hold rising numbers of labels, the last label one client alone; LoRA on all layers of an MLP."""
    bands(tmp_path)
    config = from_table(
        {
            "run": {"rounds": 8},
            "model": {"name": "fashion-mlp", "pretrained": False},
            "data": {"source": str(tmp_path / "bands.npz"), "partition": {"kind": "staircase"}},
            "clients": {"count": 3, "participation": 1.0, "ranks": [1, 2, 3], "rank_order": "rising"},
            "lora": {"target_modules": ["fc1", "fc2", "head"]},
            "method": {"name": "rbla"},
        }
    )
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    _cached_task.cache_clear()
    built: Federation = simulation.build(config)
    labels = built.engine.model.task.train.labels
    assert built.population.ranks.tolist() == [1, 2, 3]
    held = [set(labels[torch.tensor(built.engine.shards[built.population.name(i)])].tolist()) for i in range(3)]
    assert held == [{0}, {0, 1}, {0, 1, 2}]
    built.close()
    assert federate(config, tmp_path, monkeypatch)["accuracy"] > 0.8


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"no Fashion-MNIST in {FASHION}: apt-get install dataset-fashion-mnist")
def test_fashion_mnist_is_read_whole():
    train, test = images.load_split(DataConfig(source=str(FASHION)))
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6_000] * 10
    assert np.bincount(test.labels).tolist() == [1_000] * 10
    assert next(iter(train)).shape == (28, 28)


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"no Fashion-MNIST in {FASHION}: apt-get install dataset-fashion-mnist")
def test_a_base_model_knows_upright_clothes_and_a_federation_learns_turned_ones(tmp_path, monkeypatch):
    config = from_table(
        {
            "run": {"rounds": 8},
            "model": {"name": "fashion-mlp"},
            "data": {"source": str(FASHION), "rotate": 90, "test_examples": 1000},
            "clients": {"count": 10, "participation": 0.5},
            "eval": {"every": 8},
        }
    )
    cache = tmp_path / "cache"
    upright = vision.load(config.model, DataConfig(source=str(FASHION)), config.lora, cache)
    assert score(upright) > 0.8
    assert len(upright.train) == 50_000
    assert score(vision.load(config.model, config.data, config.lora, cache)) < 0.2
    assert federate(config, tmp_path, monkeypatch)["accuracy"] > 0.4


# --- transformers models ---------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {"image_size": 32, "patch_size": 8}
MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **PATCHES, num_labels=3)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SIZES, **PATCHES, num_labels=3)),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4, num_labels=3
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
}
PROCESSOR = {"size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}


def make_model(folder: Path, kind: str = "vit", names=(), headless=False) -> Path:
    """A small random model with its image processor, as their owners save them."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if names:
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    (model.base_model if headless else model).save_pretrained(folder)
    transformers.ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`{kind: model folder}`; read only."""
    root = tmp_path_factory.mktemp("models")
    return {kind: make_model(root / kind, kind) for kind in MODELS}


@pytest.fixture
def zoo(tmp_path):
    """24 colour pictures of 12 x 8 in three classes, a quarter of them held out."""
    return DataConfig(source=str(write_pictures(tmp_path / "zoo")), test_fraction=0.25)


def load(folder: Path, data: DataConfig, cache: Path, targets=(), **options) -> Task:
    model = ModelConfig(path=str(folder), **{"dtype": "float32"} | options)
    return vision.load(model, data, LoraConfig(target_modules=targets), cache)


def plain_logits(model: torch.nn.Module, folder: Path, data: DataConfig) -> torch.Tensor:
    """Logits of the held-out pictures as anybody would compute them: file, image processor, model."""
    prepare = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    _, test = images.load_split(data)
    pictures = [Image.open(test.where(i)).convert("RGB").rotate(data.rotate, expand=True) for i in range(len(test))]
    with torch.no_grad():
        return model(**prepare(images=pictures, return_tensors="pt")).logits


def original(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()


def all_of(task: Task) -> dict:
    return task.test.inputs.batch(torch.arange(len(task.test)))


def logits(task: Task) -> torch.Tensor:
    with torch.no_grad():
        return task.module(**all_of(task))


LAST = {"vit": "layers.2.attention.q_proj", "deit": "layers.2.attention.q_proj", "swin": "layers.1.blocks.0.mlp.fc1"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["inside", "last layer", "map"])
def test_a_task_computes_what_the_model_computes(models, zoo, tmp_path, kind, how):
    inside = ("convolution",) if kind == "resnet" else ()
    targets = {"inside": inside, "last layer": (LAST.get(kind, "classifier.1"),), "map": ("map",)}
    task = load(models[kind], zoo, tmp_path / "cache", targets[how])
    torch.testing.assert_close(logits(task), plain_logits(original(models[kind]), models[kind], zoo), atol=1e-4, rtol=1e-4)
    assert task.label_names == NAMES
    assert task.trained == ()
    assert "frozen head" in task.name


def test_a_frozen_prefix_runs_once_and_its_weights_are_let_go(models, zoo, tmp_path, monkeypatch):
    first = load(models["vit"], zoo, tmp_path / "cache", (LAST["vit"],))
    assert "LoRA from vit.layers.2 on, frozen prefix float32" in first.name
    assert not any(name.startswith(("vit.layers.0", "vit.layers.1")) for name, _ in first.module.named_parameters())
    assert first.train.inputs.values.shape == (18, 17, 32)  # images, 16 patches and the class token, width
    monkeypatch.setattr(frozen.cache, "store", lambda *_: pytest.fail("run again"))
    again = load(models["vit"], zoo, tmp_path / "cache", (LAST["vit"],), features="disk")
    assert torch.equal(logits(first), logits(again))


def test_layers_that_do_otherwise_alone_are_not_run_apart(models, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix.SplitClassifier, "forward", lambda self, inputs: inputs.mean(dim=1)[:, :3])
    task = load(models["vit"], zoo, tmp_path / "cache", (LAST["vit"],))
    assert "from pixels" in task.name
    torch.testing.assert_close(logits(task), plain_logits(original(models["vit"]), models["vit"], zoo), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("targets", ["default", "last"])
def test_a_saved_adapter_is_one_of_the_model_as_peft_loads_it(models, zoo, tmp_path, kind, head, targets):
    peft = pytest.importorskip("peft")
    task = load(models[kind], zoo, tmp_path / "cache", () if targets == "default" else (LAST[kind],), head=head)
    adapter = moved(task)
    adapter = Adapter(adapter.layers, {name: tensor + 0.1 for name, tensor in adapter.tensors.items()}, adapter.config)
    found = adapted_logits(task, adapter, all_of(task))
    assert (found - logits(task)).abs().max() > 0.01
    reloaded = peft.PeftModel.from_pretrained(original(models[kind]), adapter.save(tmp_path / "adapter")).eval()
    torch.testing.assert_close(found, plain_logits(reloaded, models[kind], zoo), atol=1e-4, rtol=1e-4)


def test_turned_and_grey_pictures_go_through_the_same_processor(models, tmp_path):
    data = DataConfig(source=str(write_pictures(tmp_path / "grey", GREY)), test_fraction=0.25, rotate=90)
    task = load(models["vit"], data, tmp_path / "cache")
    torch.testing.assert_close(logits(task), plain_logits(original(models["vit"]), models["vit"], data), atol=1e-4, rtol=1e-4)
    assert "turned by 90 degrees" in task.name


def test_pictures_of_any_size_are_resized(models, tmp_path):
    write_pictures(tmp_path / "zoo")
    Image.fromarray(np.tile(COLOUR[0], (5, 3, 1))).save(tmp_path / "zoo" / "cat" / "00.png")
    task = load(models["vit"], DataConfig(source=str(tmp_path / "zoo")), tmp_path / "cache")
    assert task.train.inputs.values.shape[1:] == task.test.inputs.values.shape[1:] == (3, 32, 32)


def test_bfloat16_features_are_near(models, zoo, tmp_path):
    exact, near = (load(models["vit"], zoo, tmp_path / "c", (LAST["vit"],), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert near.train.inputs.values.dtype == torch.bfloat16
    assert near.train.inputs.nbytes == exact.train.inputs.nbytes / 2
    assert (logits(near) - logits(exact)).abs().max() < 0.1 * logits(exact).abs().max()


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_default_is_the_query_and_the_value(models, zoo, tmp_path, kind):
    constants = pytest.importorskip("peft.utils.constants")
    task = load(models[kind], zoo, tmp_path / "cache")
    ends = {name.rpartition(".")[2] for name in task.targets}
    assert ends in ({"q_proj", "v_proj"}, {"query", "value"})
    assert {name.replace("q_proj", "v_proj").replace("query", "value") for name in task.targets} <= set(task.targets)
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert ends == set(table.get(kind, ends))  # PEFT's own, where it has one for the architecture
    assert set(table["llama"]) in map(set, classifier._QUERY_AND_VALUE)
    assert set(table["bert"]) in map(set, classifier._QUERY_AND_VALUE)


def test_earlier_names_of_the_projections_are_found_too(models, zoo, tmp_path):
    found = classifier.load(ModelConfig(path=str(models["vit"])), NAMES, 0)
    for layer in found.model.vit.layers:
        layer.attention.query, layer.attention.value = layer.attention.q_proj, layer.attention.v_proj
        del layer.attention.q_proj, layer.attention.v_proj
    assert {name.rpartition(".")[2] for name in classifier.targets(found, ())} == {"query", "value"}


# --- heads -----------------------------------------------------------------------------------------------------------


def test_labels_are_counted_as_the_model_counts_them(tmp_path, zoo):
    folder = make_model(tmp_path / "model", names=("elk", "cat", "dog"))
    task = load(folder, zoo, tmp_path / "cache")
    assert task.label_names == ("elk", "cat", "dog")
    assert "anew" not in task.name
    _, test = images.load_split(zoo)
    assert [task.label_names[i] for i in task.test.labels] == [NAMES[i] for i in test.labels]
    torch.testing.assert_close(logits(task), plain_logits(original(folder), folder, zoo), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("why", ["other labels", "more labels", "no head"])
def test_a_head_for_other_labels_is_made_anew(tmp_path, zoo, why):
    names = {"other labels": ("a", "b", "c"), "more labels": (), "no head": ()}[why]
    folder = make_model(tmp_path / "model", names=names, headless=why == "no head")
    if why == "more labels":
        (tmp_path / "zoo" / "fox").mkdir()
        for file in sorted((tmp_path / "zoo" / "cat").glob("*.png"))[:3]:
            file.rename(tmp_path / "zoo" / "fox" / file.name)
    frozen, again = (load(folder, zoo, tmp_path / "cache") for _ in range(2))
    trained = load(folder, zoo, tmp_path / "cache", head="trained")
    assert "frozen head made anew" in frozen.name
    assert torch.equal(frozen.module.classifier.weight, again.module.classifier.weight)
    torch.testing.assert_close(frozen.module.classifier.weight.norm(dim=1), torch.ones(len(frozen.label_names)))
    assert trained.trained == ("classifier.weight", "classifier.bias")
    assert logits(trained).abs().max() == 0


def test_a_trained_head_starts_from_the_models_own(models, zoo, tmp_path):
    inside, on_map = (load(models["resnet"], zoo, tmp_path / "c", (t,), head="trained") for t in ("convolution", "map"))
    assert inside.trained == ("classifier.1.weight", "classifier.1.bias")
    assert on_map.trained == ("head.weight", "head.bias")
    torch.testing.assert_close(logits(inside), logits(on_map), atol=1e-4, rtol=1e-4)


# --- what is wrong with a model --------------------------------------------------------------------------------------


def test_a_wrong_model_is_one_line_that_says_how_to_mend_it(models, zoo, tmp_path):
    def says(match: str, kind=ModelError):
        return pytest.raises(kind, match=match)

    with says("needs model.name .fashion-mlp, fashion-cnn, fashion-vit or a hub id"):
        vision.load(ModelConfig(), zoo, LoraConfig(), tmp_path)
    with says("no such folder"):
        load(tmp_path / "none", zoo, tmp_path)
    with says("'resnet' has no query and value projections"):
        load(models["resnet"], zoo, tmp_path)
    with says("'q_prj' matches no module of ViTForImageClassification; did you mean 'q_proj'"):
        load(models["vit"], zoo, tmp_path, ("q_prj",))
    with says("'map' is above the model and excludes other modules"):
        load(models["vit"], zoo, tmp_path, ("map", "q_proj"))
    with says("label-names is for text", ConfigError):
        load(models["vit"], zoo, tmp_path, head="label-names")
    with says("model.pretrained = false: is only for fashion-mlp", ConfigError):
        load(models["vit"], zoo, tmp_path, pretrained=False)


def test_a_folder_that_is_no_classifier_is_refused(zoo, tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="its image processor: .*; save both with save_pretrained"):
        load(folder, zoo, tmp_path)
    transformers.BertModel(transformers.BertConfig(vocab_size=9, **SIZES)).save_pretrained(folder)
    transformers.ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    with pytest.raises(ModelError, match="cannot load an image classifier"):
        load(folder, zoo, tmp_path)


def test_a_damaged_body_is_not_filled_at_random(zoo, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layers.1" in name or "layer.1" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack .* \(1 in all\)"):
        load(folder, zoo, tmp_path)


def test_colour_is_not_turned_grey_in_silence(zoo, tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, **PATCHES, num_labels=3, num_channels=1)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    scale = {"image_mean": [0.5], "image_std": [0.5]}
    transformers.ViTImageProcessor(**PROCESSOR | scale).save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="expected a grey image, which is what the model takes, got a colour one"):
        load(tmp_path / "model", zoo, tmp_path)

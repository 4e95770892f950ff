"""Folders read and written one layer at a time: the same adapters, less memory, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anyrank import Adapter, LoraLayer, aggregate
from anyrank.adapter.stored import FolderWriter, open_adapter, outline
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.errors import AdapterError, AnyRankError, MethodError, RunError, RunFailed

KINDS = {"rank 4": (4, torch.float32, False), "bfloat16": (8, torch.bfloat16, False), "rslora": (16, torch.float16, True)}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(rank: int, dtype: torch.dtype, rslora: bool, seed: int = 0) -> Adapter:
    """Three layers (a linear one, a convolution, an embedding), a head and a counter."""
    alpha = 16 / (rank**0.5 if rslora else rank)
    make = lambda k, out, width, **kind: LoraLayer(  # noqa: E731
        draw(seed + k, rank, width).to(dtype), draw(seed + k + 50, out, rank).to(dtype), alpha, **kind
    )
    layers = {
        "a.q": make(1, 10, 12),
        "a.q-norm.conv": make(2, 6, 3 * 2 * 2, kind="conv2d", kernel=(2, 2)),
        "a.table": make(3, 5, 20, kind="embedding"),
    }
    tensors = {"score.weight": draw(seed + 9, 3, 5).to(dtype), "score.count": torch.tensor(seed)}
    return Adapter(layers, tensors, {"use_rslora": rslora, "base_model_name_or_path": "base"})


@pytest.fixture
def sites(tmp_path: Path) -> list[Path]:
    return [site(*kind, seed=7 * i).save(tmp_path / f"site-{i}") for i, kind in enumerate(KINDS.values())]


def same(one: Adapter, two: Adapter) -> None:
    assert one.layers.keys() == two.layers.keys()
    for name, layer in one.layers.items():
        other = two.layers[name]
        assert torch.equal(layer.A, other.A)
        assert torch.equal(layer.B, other.B)
        assert (layer.kind, layer.kernel, layer.A.dtype) == (other.kind, other.kernel, other.A.dtype)
        assert layer.scaling == pytest.approx(other.scaling, rel=1e-12)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())


def test_an_opened_folder_is_the_loaded_one(sites: list[Path]) -> None:
    for folder in sites:
        opened, loaded = open_adapter(folder), Adapter.load(folder)
        same(Adapter(dict(opened.layers), dict(opened.tensors)), loaded)
        assert opened.config == loaded.config
        assert outline(opened).ranks == loaded.ranks
        assert {layer.A.device.type for layer in outline(opened).layers.values()} == {"meta"}


def test_what_is_written_layer_by_layer_is_what_save_writes(tmp_path: Path, sites: list[Path]) -> None:
    for folder in sites:
        adapter = Adapter.load(folder)
        writer = FolderWriter(tmp_path / "out" / folder.name, adapter.layers, adapter.tensors)
        for name in ("score.count",):  # 8 bytes a number first, 2 bytes a number last
            writer.add_tensor(name, adapter.tensors[name])
        for name in sorted(adapter.layers, reverse=True):
            writer.add_layer(name, adapter.layers[name])
        writer.add_tensor("score.weight", adapter.tensors["score.weight"])
        writer.finish(adapter.config)
        same(Adapter.load(tmp_path / "out" / folder.name), adapter)
        assert json.loads((tmp_path / "out" / folder.name / "adapter_config.json").read_text()) == json.loads(
            (folder / "adapter_config.json").read_text()
        )


def test_a_folder_that_shrinks_or_spoils_while_it_is_open_is_an_error(sites: list[Path]) -> None:
    opened = open_adapter(sites[0])
    weights = sites[0] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(AdapterError, match="it has shrunk since it was opened"):
        dict(opened.layers), dict(opened.tensors)
    weights.unlink()
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        opened.layers["a.q"]


@pytest.mark.parametrize("method", ["raflora", "rbla", "zeropad", "flexlora", "flora", "florist", "hetlora", "lora_fair"])
def test_the_library_and_the_folders_have_the_same_bytes(tmp_path: Path, sites: list[Path], method: str) -> None:
    done = aggregate_folders(sites, method, tmp_path / "out", ranks=[4, 8])
    result = aggregate(sites, method)
    same(Adapter.load(tmp_path / "out" / "global"), result.adapter)
    for rank in (4, 8):
        same(Adapter.load(tmp_path / "out" / f"rank-{rank}"), result.share(rank))
    assert ("base-update" in done["folders"]) == (result.base_update is not None)
    if result.base_update:
        same(Adapter.load(tmp_path / "out" / "base-update"), result.base_update)
    assert done["algebra"] == result.work.paths
    assert {layer.A.dtype for layer in result.adapter.layers.values()} == {torch.float32}  # the widest of three
    assert result.adapter.tensors["score.weight"].dtype == torch.float32
    assert result.adapter.tensors["score.count"].item() == 7  # the mean of 0, 7 and 14


def test_stored_and_loaded_adapters_merge_alike(sites: list[Path]) -> None:
    from anyrank import ClientUpdate

    stored = aggregate(sites, "raflora")
    loaded = aggregate([ClientUpdate(Adapter.load(folder), 1, str(folder)) for folder in sites], "raflora")
    same(stored.adapter, loaded.adapter)


@pytest.mark.parametrize("method", ["ffa_lora", "rbla"])
def test_a_result_is_no_view_of_the_files(tmp_path: Path, method: str) -> None:
    """Files are read in place: what comes of them must not change with them."""
    common = site(16, torch.float32, False)
    folders = [common.save(tmp_path / f"same-{i}") for i in range(2)]
    result = aggregate(folders, method)
    before = [(layer.A.clone(), layer.B.clone()) for layer in result.adapter.layers.values()]
    for folder in folders:
        weights = folder / "adapter_model.safetensors"
        with open(weights, "r+b") as file:
            file.write(b"\0" * weights.stat().st_size)
    after = [(layer.A, layer.B) for layer in result.adapter.layers.values()]
    assert all(torch.equal(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    """The format asks for no alignment of its header: three spaces more, and every number stands at an odd place."""
    known = site(4, torch.float32, False)
    folder = known.save(tmp_path / "odd")
    weights = folder / "adapter_model.safetensors"
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    weights.write_bytes((length + 3).to_bytes(8, "little") + raw[8 : 8 + length] + b"   " + raw[8 + length :])
    opened = open_adapter(folder)
    same(Adapter(dict(opened.layers), dict(opened.tensors)), known)


def test_previous_may_be_a_folder(tmp_path: Path, sites: list[Path]) -> None:
    start = site(16, torch.float32, False, seed=99).save(tmp_path / "start")
    from_folder = aggregate(sites[:2], "rbla", previous=start)
    same(from_folder.adapter, aggregate(sites[:2], "rbla", previous=Adapter.load(start)).adapter)
    held, merged = Adapter.load(start).layers["a.q"], from_folder.adapter.layers["a.q"]
    assert merged.rank == 16
    torch.testing.assert_close(merged.A[8:] * merged.scaling**0.5, held.A[8:] * held.scaling**0.5)


def test_files_of_the_format_pass_its_own_reader(tmp_path: Path, sites: list[Path]) -> None:
    aggregate_folders(sites, "raflora", tmp_path / "out")
    path = tmp_path / "out" / "global" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(list(file.keys())) == 8
    assert len(load_file(path)) == 8


# --- what does not fit together --------------------------------------------------------------------------------------


def refused(tmp_path: Path, error: type[AnyRankError], says: str, *arguments, **options) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error, match=says) as raised:
        aggregate_folders(*arguments, out=tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_two_base_models_are_named(tmp_path: Path, sites: list[Path]) -> None:
    config = json.loads((sites[1] / "adapter_config.json").read_text()) | {"base_model_name_or_path": "other"}
    (sites[1] / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path, AdapterError, "site-0 was trained on base, .*site-1 on other", sites, "rbla")
    assert aggregate_folders(sites, "rbla", tmp_path / "out", allow_different_base=True)["layers"] == 3


@pytest.mark.parametrize("method", ["rbla", "zeropad", "raflora", "flora"])
@pytest.mark.parametrize(("factor", "value"), [("A", torch.inf), ("B", torch.nan)])
def test_a_value_that_is_no_number_stops_the_merge_and_leaves_nothing(
    tmp_path: Path, sites: list[Path], method: str, factor: str, value: float
) -> None:
    spoiled = Adapter.load(sites[2])
    getattr(spoiled.layers["a.table"], factor)[0, 0] = value  # the last layer: others are written by then
    spoiled.save(sites[2])
    refused(tmp_path, AdapterError, "site-2, a.table: contains NaN", sites, method)


def test_heads_of_two_shapes_are_named(tmp_path: Path, sites: list[Path]) -> None:
    other = site(4, torch.float32, False)
    Adapter(other.layers, other.tensors | {"score.weight": torch.ones(4, 5)}, other.config).save(sites[1])
    refused(tmp_path, AdapterError, r"score.weight: .*site-0 has shape \[3, 5\], .*site-1 has \[4, 5\]", sites, "rbla")


@pytest.mark.parametrize(
    ("method", "says"),
    [("fedsa", "keep B, tensors for themselves"), ("local-only", "for themselves"), ("centralized", "no adapters to merge")],
)
def test_methods_that_merge_nothing_say_why(tmp_path: Path, sites: list[Path], method: str, says: str) -> None:
    refused(tmp_path, MethodError, says, sites, method)


def test_what_is_there_already_is_left_alone(tmp_path: Path, sites: list[Path]) -> None:
    (tmp_path / "out").mkdir()
    refused(tmp_path, RunError, "exists already", sites, "rbla")


def test_a_disk_that_is_full_is_a_failed_run(tmp_path: Path, sites: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FolderWriter, "add_tensor", full)
    refused(tmp_path, RunFailed, "cannot be written .No space left", sites, "rbla")


def test_a_method_with_an_aggregate_of_its_own_is_not_cut_into_layers(tmp_path: Path, sites: list[Path]) -> None:
    from anyrank import ClientUpdate
    from anyrank.methods.rbla import RBLA

    class Whole(RBLA):
        def aggregate(self, state, updates):
            return super().aggregate(state, updates)

    refused(tmp_path, MethodError, "may need all layers at once", sites, Whole())
    updates = [ClientUpdate(Adapter.load(folder), 1, str(folder)) for folder in sites]
    same(aggregate(updates, Whole()).adapter, aggregate(updates, "rbla").adapter)


# --- memory ----------------------------------------------------------------------------------------------------------

PEAKS = """
import glob, shutil, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from anyrank.aggregation import aggregate_folders

def held(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

for layers in (4, 4, 16):  # the first run loads code
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    aggregate_folders(sorted(glob.glob(f"{layers}-*")), sys.argv[1], "out", ranks=[4])
    print(held("VmHWM"))
    shutil.rmtree("out")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("method", ["raflora", "rbla"])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, method: str) -> None:
    """A layer of all clients is 5 MB of files here: 12 more of them would show as 60 MB if they were held."""
    for layers in (4, 16):
        for i, rank in enumerate((4, 16, 64)):
            layer = LoraLayer(draw(i, rank, 8192), draw(i + 5, 8192, rank), 1.0)
            Adapter({f"m.{n}": layer for n in range(layers)}).save(tmp_path / f"{layers}-{i}")
    done = subprocess.run([sys.executable, "-c", PEAKS, method], cwd=tmp_path, capture_output=True, text=True, check=True)
    _, few, many = map(float, done.stdout.split())
    assert many - few < 20

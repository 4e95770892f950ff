"""`anyrank aggregate` and `anyrank inspect` as typed, on folders that PEFT wrote and PEFT loads again."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from anyrank import Adapter
from anyrank.cli import main

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SITES = {
    "site-a": (4, torch.float32, False, 3),
    "site-b": (8, torch.bfloat16, False, 2),
    "site-c": (16, torch.float32, True, 1),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.score = nn.Linear(24, 20), nn.Linear(20, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.tanh(self.v(torch.tanh(self.q(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folders that PEFT wrote: ranks 4, 8, 16, one in bfloat16, one with rsLoRA, all with a trained head."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, (rank, dtype, rslora, _)) in enumerate(SITES.items(), 1):
        options = {"target_modules": ["q", "v"], "modules_to_save": ["score"], "use_rslora": rslora}
        model = get_peft_model(net(), LoraConfig(r=rank, lora_alpha=16, **options))
        draw = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.3).to(dtype)
        model.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def anyrank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anyrank", *arguments])
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as done:
            main()
        torch.set_num_threads(threads)
        told = capsys.readouterr()
        return done.value.code or 0, told.out, told.err

    return call


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Each layer's change in float64, straight from the files."""
    config, state = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    B, A = ({n: state[f"base_model.model.{n}.lora_{f}.weight"].double() for n in ("q", "v")} for f in "BA")
    return {name: scaling * B[name] @ A[name] for name in ("q", "v")}


def applied(model: nn.Module, change: dict[str, torch.Tensor], head: dict[str, torch.Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, delta in change.items():
        getattr(model, name).weight.data += delta.float()
    model.score.load_state_dict(head)
    return model


def truncated(M: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank]


def test_mixed_folders_merge_by_one_command_and_load_in_peft(sites: Path, anyrank) -> None:
    """What PEFT applies after loading is the rank-r truncation of the definition, through its own forward pass."""
    words = [f"{name}={examples}" for name, (*_, examples) in SITES.items()]
    status, out, _ = anyrank("aggregate", "--method", "flexlora", "--ranks", "4,8", "--out", "merged", "--json", *words)
    assert status == 0
    told = json.loads(out)
    assert told["folders"] == ["global", "rank-4", "rank-8"]
    assert [client["num_examples"] for client in told["clients"]] == [3, 2, 1]
    p = {name: examples / 6 for name, (*_, examples) in SITES.items()}
    total = {layer: sum(p[name] * dense(sites / name)[layer] for name in SITES) for layer in ("q", "v")}
    heads = {name: Adapter.load(sites / name).tensors for name in SITES}
    head = {k: sum(p[n] * heads[n][f"score.{k}"].float() for n in SITES) for k in ("weight", "bias")}
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(9))
    for folder, rank in (("global", 16), ("rank-8", 8), ("rank-4", 4)):
        expected = applied(net(), {layer: truncated(M, rank) for layer, M in total.items()}, head)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
            loaded = PeftModel.from_pretrained(net(), sites / "merged" / folder)
        torch.testing.assert_close(loaded(x), expected(x), rtol=1e-5, atol=1e-5)
        assert Adapter.load(sites / "merged" / folder).ranks == {"q": rank, "v": rank}


def test_a_stack_goes_into_the_base_model_and_loads_in_peft(sites: Path, anyrank) -> None:
    assert anyrank("aggregate", "--method", "flora", "--out", "merged", *SITES)[0] == 0
    total = {layer: sum(dense(sites / name)[layer] for name in SITES) / 3 for layer in ("q", "v")}
    found = Adapter.load(sites / "merged" / "base-update")
    for name, layer in found.layers.items():
        torch.testing.assert_close(layer.delta().double(), total[name], rtol=1e-5, atol=1e-5)
    model = PeftModel.from_pretrained(net(), sites / "merged" / "base-update").merge_and_unload()
    torch.testing.assert_close(model.q.weight, net().q.weight + total["q"].float(), rtol=1e-5, atol=1e-5)


def test_options_and_tables_for_people(sites: Path, anyrank) -> None:
    arguments = ("--method", "raflora", "--option", "split=balanced", "--algebra", "gram", "--out", "merged")
    status, out, err = anyrank("aggregate", *arguments, *SITES)
    assert (status, err) == (0, "")
    assert "2 by gram; backward error" in out
    assert "merged/global" in out


def test_inspect_tells_ranks_norms_and_spectra(sites: Path, anyrank) -> None:
    status, out, _ = anyrank("inspect", "site-a", "site-c", "--json")
    assert status == 0
    one, two = json.loads(out)["adapters"]
    assert (one["total"]["ranks"], two["total"]["ranks"]) == ([4], [16])
    assert list(one["total"]["energy_past"]) == ["1", "2", "4", "8"]  # the same ranks for both
    for report, name in ((one, "site-a"), (two, "site-c")):
        change = dense(sites / name)
        for layer in report["layers"]:
            values = torch.linalg.svdvals(change[layer["layer"]])
            assert layer["values"] == pytest.approx(values[: len(layer["values"])].tolist(), rel=1e-6)
            assert layer["norm"] == pytest.approx(float(change[layer["layer"]].norm()), rel=1e-6)
            assert layer["energy_past"]["2"] == pytest.approx(float((values[2:] ** 2).sum() / (values**2).sum()), abs=1e-6)
        norm = math.sqrt(sum(float(M.norm()) ** 2 for M in change.values()))
        assert report["total"]["norm"] == pytest.approx(norm, rel=1e-6)
    assert one["total"]["energy_past"]["4"] == pytest.approx(0, abs=1e-9)
    assert one["tensors"] == {"score.bias": [3], "score.weight": [3, 24]}
    status, out, _ = anyrank("inspect", "site-a", "site-c")
    assert "energy past rank" in out
    assert "site-c" in out


# --- requests that are wrong -----------------------------------------------------------------------------------------


def drop_layer(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({key: value for key, value in state.items() if ".v." not in key}, folder / WEIGHTS)


def put_nan(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["base_model.model.v.lora_B.weight"][0, 0] = torch.nan
    save_file(state, folder / WEIGHTS)


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")


def reconfigure(**changes: object):
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return spoil


SPOILED = {
    "missing folder": (lambda f: f.rename(f.with_name("gone")), "site-b: no such folder"),
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), "site-b: no adapter_model.safetensors"),
    "NaN": (put_nan, "site-b, v: contains NaN"),
    "pickle": (pickle_weights, "never read"),
    "lacking layer": (drop_layer, "layer v: site-a has it, site-b does not"),
    "other base": (reconfigure(base_model_name_or_path="other"), "base model: "),
    "dora": (reconfigure(use_dora=True), "use_dora is set"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "not a readable safetensors file"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_does_not_fit_is_one_line_and_leaves_nothing(sites: Path, anyrank, case: str) -> None:
    reconfigure(base_model_name_or_path="base")(sites / "site-a")
    spoil, says = SPOILED[case]
    spoil(sites / "site-b")
    before = sorted(path.name for path in sites.iterdir())
    status, out, err = anyrank("aggregate", "--method", "rbla", "--out", "merged", "site-a", "site-b")
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in sites.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "rbla", "site-a=many", "site-b=2"), "site-a=many: expected its number of examples, at least 1"),
        (("--method", "rbla", "site-a=0", "site-b=2"), "site-a=0: expected its number of examples, at least 1"),
        (("--method", "rbla", "site-a=-3", "site-b=2"), "site-a=-3: expected its number of examples, at least 1"),
        (("--method", "rbla", "site-a=", "site-b=2"), "site-a=: expected a whole number"),
        (("--method", "rbla", "site-a", "site-b=2"), "site-a: no examples given, while others have them"),
        (("--method", "rbla", "site-a", "site-a"), "client site-a occurs twice"),
        (("--method", "rafola", "site-a"), "did you mean 'raflora'"),
        (("--method", "raflora", "--option", "splt=balanced", "site-a"), "did you mean 'split'"),
        (("--method", "raflora", "--option", "split", "site-a"), "expected KEY=VALUE"),
        (("--method", "raflora", "--algebra", "qrr", "site-a"), "did you mean 'qr'"),
        (("--method", "raflora", "--device", "gpu", "site-a"), "device 'gpu': expected one that merges can use"),
        (("--method", "raflora", "--ranks", "4,x", "site-a"), "expected ranks of at least 1"),
        (("--method", "raflora", "--ranks", "0", "site-a"), "expected ranks of at least 1"),
        (("--method", "raflora", "--previous", "nowhere", "site-a"), "nowhere: no such folder"),
        (("--method", "fedavg", "site-a", "site-b"), "expected clients of one rank, got ranks 4, 8"),
        (("--method", "ffa_lora", "site-a", "site-b"), "needs one A for all clients"),
        (("--method", "fedsa", "site-a", "site-b"), "for themselves"),
        (("--method", "local-only", "site-a", "site-b"), "for themselves"),
        (("--method", "centralized", "site-a", "site-b"), "no adapters to merge"),
        (("--method", "rbla", "--out", "site-c", "site-a"), "site-c: exists already"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(sites: Path, anyrank, arguments: tuple[str, ...], says: str) -> None:
    before = sorted(path.name for path in sites.iterdir())
    status, out, err = anyrank("aggregate", *(() if "--out" in arguments else ("--out", "merged")), *arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in sites.iterdir()) == before
    status, _, err = anyrank("inspect", "site-a", "nowhere")
    assert (status, "no such folder" in err) == (2, True)


def test_a_folder_with_the_sign_in_its_name_is_a_folder(sites: Path, anyrank) -> None:
    (sites / "site-a").rename(sites / "alpha=16")
    status, out, _ = anyrank("aggregate", "--method", "rbla", "--out", "merged", "--json", "alpha=16", "site-b")
    assert status == 0
    assert [client["client"] for client in json.loads(out)["clients"]] == ["alpha=16", "site-b"]

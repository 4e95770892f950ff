"""The documents promise nothing that the code does not keep."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from anyrank import Adapter, ClientUpdate, LoraLayer, aggregate, simulation
from anyrank.config.sections import Config
from anyrank.config.tables import from_table, load
from anyrank.errors import AdapterError
from anyrank.methods import make
from anyrank.methods.catalog import catalog
from anyrank.studies import comparison
from anyrank.studies import study as studies
from anyrank.tasks.metrics import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_methods_table_is_the_registry() -> None:
    table = re.findall(
        r"^\| `([a-z_-]+)` \| (.*) \|$", README.split("## Methods")[1].split("## Merge adapter folders")[0], flags=re.M
    )
    told = {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in table}
    entries = catalog()
    assert told.keys() == {entry["name"] for entry in entries}
    for entry in entries:
        mixed = "yes" if entry["mixed_ranks"] else "no"
        expected = [entry["summary"], ", ".join(entry["train"]), mixed, entry["exact"], entry["stationary"], entry["paper"]]
        assert told[entry["name"]] == expected


def test_every_method_and_option_is_explained() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    for entry in catalog():
        assert re.search(rf"^## .*\b{entry['name']}\b", text, flags=re.M), entry["name"]
        for option in entry["options"]:
            assert f"`{option}`" in text, f"{entry['name']}: {option}"


def test_the_library_example_runs(tmp_path: Path) -> None:
    for site, rank in (("site-a", 8), ("site-b", 32)):
        layer = LoraLayer(torch.randn(rank, 40), torch.randn(48, rank), 16 / rank)
        Adapter({"encoder.q": layer}).save(tmp_path / site)
    (code,) = blocks(README, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Adapter.load(tmp_path / "merged").ranks == {"encoder.q": 32}
    share = Adapter.load(tmp_path / "for-site-a").layers["encoder.q"]
    assert (share.rank, share.scaling) == (8, 2.0)


def test_the_explained_config_is_the_one_in_the_repository() -> None:
    (text,) = blocks(README, "toml")
    stored = tomllib.loads((ROOT / "configs" / "banking77.toml").read_text())
    assert from_table(tomllib.loads(text)) == from_table(stored)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path: Path) -> None:
    assert load(path).run.name


STUDIES = sorted((ROOT / "configs" / "papers").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_valid_and_told(path: Path) -> None:
    """Its file can be read, its methods exist, and its block in the results names its claim and every one of its rows."""
    study = studies.load(path)
    for setting in study.settings:
        for label in setting.methods:
            chosen = comparison.variant(setting.config, label)
            make(chosen.method.name, chosen.method.options)
    page = (ROOT / "docs" / "results.md").read_text()
    block = page.split(f"<!-- {path.stem} -->")[1].split(f"<!-- end of {path.stem} -->")[0]
    assert study.claim in block
    tables = re.findall(r"^\*\*(.*) \(seeds ([0-9, ]+)\)\*\*$", block, flags=re.M)
    assert [name for name, _ in tables] == [setting.name for setting in study.settings]
    for (_, seeds), setting in zip(tables, study.settings, strict=True):
        assert len(seeds.split(",")) == setting.seeds
    rows = [row for setting in study.settings for row in setting.methods]
    assert re.findall(r"^\| `(.*?)` \|", block, flags=re.M) == rows


def test_every_block_of_the_results_has_its_study_or_script() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    told = dict(re.findall(r"^<!-- end of (.*) -->$()", page, flags=re.M))
    assert {path.stem for path in STUDIES} <= told.keys()
    for name in told.keys() - {path.stem for path in STUDIES}:
        block = page.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        (script,) = re.findall(r"`python (experiments/\w+\.py)`", block)
        assert (ROOT / script).is_file()


def test_the_method_to_paste_in_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pasted into a file and named in a config, it runs, and its option matters: by the examples it is raFLoRA, as it says."""
    (code,) = blocks((ROOT / "docs" / "add-a-method.md").read_text(), "python")
    assert len(code.splitlines()) < 60
    (tmp_path / "equal_voices.py").write_text(code)
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    config = Config().replace(
        run={"rounds": 3},
        model={"name": "digits-mlp"},
        method={"name": "equal-voices", "file": str(tmp_path / "equal_voices.py")},
    )
    try:
        summary = simulation.execute(config, tmp_path / "run")
        assert summary["accuracy"] > summary["start_accuracy"]
        by_examples = simulation.execute(config.replace(method={"options": {"power": 1.0}}), tmp_path / "by-examples")
        peer = simulation.execute(
            config.replace(method={"name": "raflora", "file": "", "options": {"empty_slice": "zero"}}), tmp_path / "peer"
        )
        assert by_examples["loss"] == pytest.approx(peer["loss"], rel=1e-9)
        assert summary["loss"] != pytest.approx(peer["loss"], rel=1e-3)
    finally:
        from anyrank.methods import REGISTRY

        del REGISTRY["equal-voices"]


def test_the_metrics_to_paste_in_work(tmp_path: Path) -> None:
    """Pasted into a file and named as the document names them, they are in every file of a run."""
    page = (ROOT / "docs" / "add-a-metric.md").read_text()
    (code,), (config,) = blocks(page, "python"), blocks(page, "toml")
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "run.toml").write_text(f'[run]\nrounds = 2\n[model]\nname = "digits-mlp"\n{config}')
    chosen = load(tmp_path / "run.toml")
    try:
        summary = simulation.execute(chosen, tmp_path / "run")
        assert list(summary["metrics"]) == list(chosen.eval.metrics)
        assert summary["metrics"]["top3"] >= summary["accuracy"]
        assert 0 < summary["metrics"]["weighted_error"] < 1
        for name in REGISTRY.keys() - {"kappa", "weighted_error", "top3"}:
            assert f"`{name}`" in page
    finally:
        for name in ("kappa", "weighted_error", "top3"):
            REGISTRY.pop(name, None)


LOOP, FLOWER, NVFLARE = blocks((ROOT / "docs" / "aggregate.md").read_text(), "python")


def peft_clients() -> dict[str, tuple[torch.nn.Module, int]]:
    """Two PEFT models of one base, at ranks 2 and 4, as after local training, with their examples."""
    from peft import LoraConfig, get_peft_model

    trained = {}
    for seed, (name, rank) in enumerate({"a": 2, "b": 4}.items(), 1):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 6))
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=8, target_modules=["0", "2"]))
        draw = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=draw)
        trained[name] = model, 10 * seed
    return trained


def merged_by_hand(trained: dict[str, tuple[torch.nn.Module, int]]) -> dict[str, Adapter]:
    from peft import get_peft_model_state_dict

    updates = [
        ClientUpdate(Adapter.from_state_dict(get_peft_model_state_dict(m), m.peft_config["default"].to_dict()), n, name)
        for name, (m, n) in trained.items()
    ]
    merged = aggregate(updates, method="raflora")
    return {name: merged.share(m.peft_config["default"].r) for name, (m, _) in trained.items()}


def test_the_plain_loop_changes_what_the_models_apply() -> None:
    trained = peft_clients()
    expected = merged_by_hand(trained)
    exec(LOOP, {"trained": trained})
    for name, (model, _) in trained.items():
        for layer, share in expected[name].layers.items():
            change = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
            torch.testing.assert_close(change, share.delta(), rtol=1e-5, atol=1e-5)


def test_the_flower_and_nvflare_examples_give_the_same_on_arrays() -> None:
    from peft import get_peft_model_state_dict

    trained = peft_clients()
    expected = {name: share.state_dict(numpy=True) for name, share in merged_by_hand(trained).items()}
    configs = {name: model.peft_config["default"] for name, (model, _) in trained.items()}
    states = {
        name: {key: value.numpy() for key, value in sorted(get_peft_model_state_dict(model).items())}
        for name, (model, _) in trained.items()
    }
    room: dict = {}
    exec(FLOWER, room)
    keys = list(states["a"])
    results = [(name, list(states[name].values()), examples) for name, (_, examples) in trained.items()]
    arrays = room["aggregate_arrays"](results, keys, configs)
    exec(NVFLARE, room)
    aggregator = room["AnyRankAggregator"](configs)
    for name, (_, examples) in trained.items():
        aggregator.accept(name, states[name], examples)
    dicts = aggregator.aggregate()
    for name, share in expected.items():
        for key, array, value in zip(keys, arrays[name], share.values(), strict=True):
            assert array.tobytes() == value.tobytes() == dicts[name][key].tobytes()


def test_bfloat16_does_not_become_an_array_by_itself() -> None:
    adapter = Adapter({"q": LoraLayer(torch.ones(1, 3).bfloat16(), torch.ones(2, 1).bfloat16(), 1.0)})
    with pytest.raises(AdapterError, match="NumPy has no bfloat16"):
        adapter.state_dict(numpy=True)


def test_the_tree_in_the_readme_exists() -> None:
    tree = README.split("## The repository")[1].split("```")[1]
    names = re.findall(r"[\w./]+(?:\.py|/)(?=\s)", tree)
    assert len(names) > 20
    for name in names:
        rooms = (ROOT / "src" / "anyrank", ROOT / "tests")
        assert (ROOT / name).exists() or any(any(room.rglob(name.rstrip("/"))) for room in rooms), name


def test_commands_and_links_exist() -> None:
    verbs = set(re.findall(r"\$ anyrank (\w+)|`anyrank (\w+)`", README))
    known = subprocess.run([sys.executable, "-m", "anyrank", "--help"], capture_output=True, text=True, check=True).stdout
    for verb in {name for pair in verbs for name in pair if name}:
        assert re.search(rf"│ {verb} ", known), verb
    targets = set(re.findall(r"make (\w+)", README)) - {"sure"}
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_federation_from_python_runs_in_under_twenty_lines(tmp_path: Path) -> None:
    """The script in the document is the one in `examples/`, and it learns."""
    code = blocks((ROOT / "docs" / "python.md").read_text(), "python")[0]
    assert code == (ROOT / "examples" / "own_module.py").read_text()
    assert len(code.splitlines()) < 20
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start, end, f1 = map(float, done.stdout.split())
    assert end > start + 0.3
    assert f1 > 0.85
    assert set(Adapter.load(tmp_path / "for-south").ranks.values()) == {1}


def test_the_hostile_client_of_the_example_ruins_what_the_guard_keeps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "hostile_client.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    without, guarded = map(float, re.findall(r"0\.\d{3}", done.stdout))
    assert guarded > without + 0.2


def test_the_notebook_is_the_script_and_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((ROOT / "examples" / "own_module.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = (ROOT / "examples" / "own_module.py").read_text()
    assert "\n".join(code).split() == script.split()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in code:
        exec(compile(cell, "a cell", "exec"), names)
    assert names["result"].summary["accuracy"] > 0.8


def test_the_task_of_the_document_takes_part_in_commands(anyrank, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    (tmp_path / "blobs.py").write_text(blocks(text, "python")[1])
    (tmp_path / "own.toml").write_text(blocks(text, "toml")[0] + "[clients]\ncount = 4\nranks = [1, 2]\n[run]\nrounds = 3\n")
    done = anyrank("run", "own.toml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train_examples"] == 500

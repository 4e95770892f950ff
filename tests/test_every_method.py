"""Every method in a small federation from end to end: it runs, it resumes at each round to the same bytes, and what it leaves
can be loaded by others."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.federation import loop
from anyrank.methods import REGISTRY
from anyrank.runs.checkpoint import load_state
from anyrank.runs.folder import RunDir

ROUNDS = 3
METHODS = sorted(name for name, kind in REGISTRY.items() if kind.__module__.startswith("anyrank.methods"))
# Options that add to what a server remembers, or to what follows from a round's number.
CHOSEN = [(method, {}) for method in METHODS]
CHOSEN += [("stayput", {"true_point": True, "rotate": True, "momentum": 0.5, "server_rank": 12})]
every_choice = pytest.mark.parametrize(("method", "options"), CHOSEN, ids=["-".join([m, *options]) for m, options in CHOSEN])


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def config(method: str, rounds: int = ROUNDS, steps: int = 2, **options) -> Config:
    ranks = (1, 2, 8) if REGISTRY[method].traits.mixed_ranks else (4,)
    return Config().replace(
        run={"rounds": rounds},
        model={"name": "digits-mlp", "head": "trained"},
        clients={"count": 6, "participation": 0.5, "ranks": ranks},
        train={"local_steps": steps},
        method={"name": method, "options": options},
    )


def files(folder: Path) -> dict[str, bytes]:
    """All adapters and the log of the rounds, but for its clock."""
    found = {
        str(p.relative_to(folder)): p.read_bytes() for kind in ("adapter*", "base-update") for p in folder.glob(f"{kind}/*")
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found | {"metrics": json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()}


class Stop(Exception):
    """Raised between two rounds, where a run may be stopped."""


def stopped(config: Config, out: Path, after: int) -> None:
    """The first rounds of a run, up to `after`."""

    def tell(metrics: dict) -> None:
        if metrics["round"] == after:
            raise Stop

    built = simulation.build(config)
    try:
        with RunDir.open(out, config, resume=True) as store, pytest.raises(Stop):
            loop.run(built, store, tell)
    finally:
        built.close()


@every_choice
def test_a_run_stopped_after_any_round_goes_on_to_the_same_bytes(method: str, options: dict, tmp_path: Path) -> None:
    summary = simulation.execute(config(method, **options), tmp_path / "whole")
    assert summary["rounds"] == ROUNDS
    assert 0 <= summary["accuracy"] <= 1
    assert summary["rejected"] == 0
    for after in range(1, ROUNDS):
        stopped(config(method, **options), tmp_path / f"stopped-{after}", after)
        simulation.execute(config(method, **options), tmp_path / f"stopped-{after}", resume=True)
        assert files(tmp_path / f"stopped-{after}") == files(tmp_path / "whole")


@every_choice
def test_every_method_learns(method: str, options: dict, tmp_path: Path) -> None:
    summary = simulation.execute(config(method, rounds=8, steps=20, **options), tmp_path / "run")
    assert summary["accuracy"] > summary["start_accuracy"] + 0.1


@pytest.mark.parametrize("method", ["flora", "fedex", "raflora"])
def test_what_a_run_leaves_gives_its_accuracy_in_peft(method: str, tmp_path: Path) -> None:
    """The base update merged into the base model by PEFT, the adapter loaded on top."""
    ran = config(method, steps=5)
    summary = simulation.execute(ran, tmp_path / "run")
    built = simulation.build(ran)
    built.close()
    task = built.engine.model.task
    net = copy.deepcopy(task.module)
    if method != "raflora":
        base = Adapter.load(tmp_path / "run" / "base-update")
        assert max(base.ranks.values()) > 8, "larger than any client's rank"
        net = PeftModel.from_pretrained(net, tmp_path / "run" / "base-update").merge_and_unload()
    assert (tmp_path / "run" / "base-update").exists() == (method != "raflora")
    model = PeftModel.from_pretrained(net, tmp_path / "run" / "adapter").eval()
    with torch.inference_mode():
        logits = model(task.test.inputs.values)
    assert float((logits.argmax(dim=1) == task.test.labels).double().mean()) == pytest.approx(summary["accuracy"], abs=1e-9)


@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_the_spectrum_of_a_run_is_that_of_base_and_adapter_together(method: str, tmp_path: Path) -> None:
    simulation.execute(config(method), tmp_path / "run")
    state = load_state(tmp_path / "run" / "checkpoint" / "state.safetensors")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for name, values in last["spectrum"].items():
        whole = sum(part.layers[name].delta().double().numpy() for part in (state.adapter, state.merged))
        expected = np.linalg.svd(whole, compute_uv=False)
        np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-4, atol=1e-6)
        assert np.all(expected[len(values) :] < 1e-6)
    assert last["collapse"] > 0


def test_hetloras_clients_lower_their_ranks_and_send_less(tmp_path: Path) -> None:
    """Under plain SGD and a strong penalty. Zero-padding shrinks a tail by itself, so clients have one rank here."""
    pressed, free = (config("hetlora", rounds=8, steps=5, **options) for options in ({"penalty": 1.0}, {"prune": False}))
    plan = {"optimizer": "sgd", "learning_rate": 0.02}
    pressed, free = (c.replace(clients={"participation": 1.0, "ranks": (8,)}, train=plan) for c in (pressed, free))
    sent = {}
    for name, chosen in (("pressed", pressed), ("free", free)):
        simulation.execute(chosen, tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        sent[name] = [row["upload_bytes"] for row in rows]
    assert len(set(sent["free"])) == 1
    assert sent["pressed"][0] == sent["free"][0]
    assert sent["pressed"] == sorted(sent["pressed"], reverse=True)
    assert sent["pressed"][-1] < 0.9 * sent["free"][-1]
    ranks = load_state(tmp_path / "pressed" / "checkpoint" / "state.safetensors").extra["ranks"].tensors
    assert ranks.keys() == {f"client-{i}" for i in range(6)}
    assert min(int(rank.min()) for rank in ranks.values()) >= 1
    assert max(int(rank.sum()) for rank in ranks.values()) < 8 + 8, "every client has dropped slices of one layer or both"


def test_personal_and_halved_traffic_is_counted(tmp_path: Path) -> None:
    """A `[r, 64]` and B `[64, r]` in two layers, head 10 * 64 + 10, float32; the cohort of round 1 the same for all."""
    up, down = {}, {}
    for method in ("raflora", "fedsa", "rolora", "local-only"):
        simulation.execute(config(method), tmp_path / method)
        row = json.loads((tmp_path / method / "metrics.jsonl").read_text().splitlines()[0])
        up[method], down[method] = row["upload_bytes"], row["download_bytes"]
    head = 3 * (10 * 64 + 10) * 4
    factors = up["raflora"] - head
    assert down["raflora"] == up["raflora"]
    assert up["fedsa"] == down["fedsa"] == factors / 2
    assert (up["rolora"], down["rolora"]) == (factors / 2 + head, factors + head)
    assert up["local-only"] == down["local-only"] == 0

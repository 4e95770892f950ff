"""A rehearsal of a private run: what its sites grant, and what it reports of their ledgers (ANYRANK_SITES=all)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("nvflare")
pytest.importorskip("transformers")
dp = pytest.importorskip("dp_accounting")
from dp_accounting.pld import PLDAccountant  # noqa: E402

from anyrank.config.tables import from_table  # noqa: E402
from anyrank.parties import rehearsal  # noqa: E402
from anyrank.privacy.grant import Grant, Release, Spent  # noqa: E402
from anyrank.privacy.plan import plan_privacy  # noqa: E402
from deploy_world import call, texts  # noqa: E402
from tiny import make_model  # noqa: E402

LONG = pytest.mark.skipif(os.environ.get("ANYRANK_SITES") != "all", reason="ANYRANK_SITES=all runs it (`make sites`)")
DELTA, ROUNDS, DECLARED = 1e-5, 3, 48
LABELS = ("in", "out")
ASKED = {
    "epsilon": {"epsilon": 6.0},
    "a small epsilon": {"epsilon": 0.5},
    "by Rényi bounds": {"epsilon": 6.0, "accountant": "rdp"},
    "by another library": {"epsilon": 6.0, "accountant": "prv"},
    "noise": {"noise_multiplier": 0.4},
}


def table(folder: Path, level: str = "example", **asked: Any) -> dict[str, Any]:
    return {
        "run": {"name": "private", "rounds": ROUNDS},
        "model": {"task": "text-classification", "path": str(folder / "model"), "head": "frozen", "dtype": "float32"},
        "data": {"label_names": list(LABELS)},
        "lora": {"target_modules": ["query", "value"]},
        "train": {"local_steps": 2, "batch_size": 8},
        "method": {"name": "rbla"},
        "eval": {"where": "sites"},
        "privacy": {"level": level, "delta": DELTA, "clip": 0.5, **asked},
        "sites": [{"name": name, "rank": rank, "source": str(folder / f"{name}.csv")} for name, rank in (("a", 4), ("b", 8))],
    }


@pytest.mark.parametrize("level", ["example", "client"])
@pytest.mark.parametrize("asked", ASKED)
def test_a_rehearsal_grants_each_site_what_the_run_spends(tmp_path: Path, level: str, asked: str) -> None:
    """Whatever accountant has computed the run's noise, the site's own lets all rounds pass; and no run more where a budget is
    given."""
    pytest.importorskip("opacus") if asked == "by another library" else None
    config = from_table(table(tmp_path, level, **ASKED[asked]))
    plan = plan_privacy(config, [DECLARED, DECLARED])
    granted = rehearsal.site_table(config, config.sites[0])["privacy"]
    ledger = Grant(tmp_path, granted["level"], granted["epsilon"], granted["delta"])
    spending = plan.spending(DECLARED, 1)
    release = Release(level, spending.sampling_rate, spending.noise_multiplier, spending.steps)
    assert charged(ledger, release, ROUNDS) == ROUNDS
    more = charged(ledger, release, ROUNDS)
    assert more < ROUNDS if "epsilon" in ASKED[asked] else more == ROUNDS


def charged(ledger: Grant, release: Release, most: int) -> int:
    """How many of `most` releases the budget allows."""
    for number in range(most):
        try:
            ledger.charge(release, {})
        except Spent:
            return number
    return most


@LONG
@pytest.mark.parametrize("asked", ["epsilon", "noise"])
def test_a_private_rehearsal_reports_what_each_sites_own_ledger_has_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    make_model(tmp_path / "model")
    for name in ("a", "b"):
        texts(tmp_path / f"{name}.csv", 60, LABELS)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table(tmp_path, **ASKED[asked])))
    out = tmp_path / "out"
    assert call(monkeypatch, "deploy", "rehearse", str(tmp_path / "run.toml"), "--out", str(out), "--json") == (0, "")
    found = json.loads(capsys.readouterr().out)
    assert json.loads((out / "rehearsal.json").read_text()).items() <= found.items()
    summary = json.loads((Path(found["folder"]) / "summary.json").read_text())
    for row in found["sites"]:
        charges = [json.loads(line) for line in Path(row["ledger"]).read_text().splitlines()]
        accountant = PLDAccountant()
        for each in charges:
            step = dp.PoissonSampledDpEvent(each["sampling_rate"], dp.GaussianDpEvent(each["noise_multiplier"]))
            accountant.compose(step, each["steps"])
        assert (row["rounds"], row["releases"], row["accuracy"]) == (ROUNDS, ROUNDS, None)
        assert row["epsilon"] == pytest.approx(accountant.get_epsilon(DELTA), rel=0.01)
        assert row["epsilon_by_server"] == summary["privacy"]["epsilon_by_client"][row["name"]]
        assert row["epsilon"] == pytest.approx(row["epsilon_by_server"], rel=0.01)
    assert found["epsilon"] == max(row["epsilon"] for row in found["sites"])
    said = rehearsal.in_words(found)
    assert f"{found['sites'][0]['epsilon']:.3f}" in said[2]
    assert "own ledger" in said[-2]

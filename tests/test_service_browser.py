"""The status page in a browser: it fits a phone, works by keyboard, is readable in both themes, and stays up to date."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from browser import CHROMIUM, Browser
from service_world import add, client, locked, make_run, metrics, served

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here; Debian's package of that name has one")

LONG = "a-name-without-any-gap-" * 5
REASON = "layer encoder.layer.0.attention.self.query, A: expected finite values, got NaN or infinite ones; " * 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Two runs: one of 200 sites, with long names and reasons, and one that tests may add to."""
    folder = tmp_path_factory.mktemp("browser")
    names = [LONG, *(f"site-{number}" for number in range(199))]
    run = make_run(
        folder / "runs" / "many", rounds=0, names=names, config='[[sites]]\nname = "site-0"\nrank = 4\nsource = "x"\n'
    )
    for round in (1, 2, 3):
        add(run, "clients.jsonl", *(client(round, name, *(("rejected", REASON) if name == LONG else ())) for name in names))
        scores = {name: {"accuracy": 0.1 * round, "loss": 1.0, "test_examples": 5} for name in names}
        add(run, "metrics.jsonl", metrics(round, accuracy=0.2 * round, sites=scores, idle=REASON if round == 2 else ""))
    (run / "adapter-rank-4").mkdir()
    (run / "adapter-rank-4" / "adapter_config.json").write_text("{}")
    live = make_run(folder / "runs" / "live", rounds=1)
    (folder / "profile").mkdir()
    with locked(live), served("runs", cwd=folder) as server:
        keys = {each["name"]: each["key"] for each in json.loads(server.get("/runs.json").read())["runs"]}
        page = Browser(folder / "profile")
        try:
            pages = {"": server.url, **{name: f"{server.url}run/{key}" for name, key in keys.items()}}
            yield SimpleNamespace(page=page, urls=pages, live=live, server=server)
        finally:
            page.close()


# The least contrast of any text with what is behind it, and that text: WCAG 2.1, 1.4.3.
CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255, v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = parse(getComputedStyle(each).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest("noscript")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 200)];
  }
  return worst;
})()"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["", "many", "live"])
def test_a_page_fits_its_screen_is_readable_and_breaks_no_rule_of_its_own(
    name: str, width: int, dark: bool, world: SimpleNamespace
) -> None:
    page = world.page
    page.events.clear()
    page.look(width, dark=dark)
    page.open(world.urls[name])
    page.until("document.getElementById('connection').textContent === 'live'")
    assert page.ask("document.documentElement.scrollWidth") == width
    assert page.ask("document.body.scrollWidth") <= width
    ratio, where = page.ask(CONTRAST)
    assert ratio >= 4.5, where
    assert page.faults() == []
    asked = [each["params"]["request"]["url"] for each in page.events if each.get("method") == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith((world.server.url, "data:")) for url in asked)  # nothing from elsewhere


def test_everything_that_can_be_used_is_reached_by_tab_and_shows_the_focus(world: SimpleNamespace) -> None:
    page = world.page
    page.look(1280)
    page.open(world.urls["many"])
    page.until("document.getElementById('connection').textContent === 'live'")
    controls = "[...document.querySelectorAll('a, summary, .scroll')].filter((each) => each.checkVisibility())"
    count = page.ask(f"{controls}.length")
    assert count >= 8
    reached = set()
    for _ in range(count + 5):
        page.press("Tab")
        place = page.ask(f"{controls}.indexOf(document.activeElement)")
        if place >= 0:
            reached.add(place)
            style = page.ask("(({outlineStyle: a, outlineWidth: b}) => a + b)(getComputedStyle(document.activeElement))")
            assert re.fullmatch("(solid|auto)[1-9].*", style)
    assert len(reached) == count


def test_tables_have_headers_and_changes_are_announced(world: SimpleNamespace) -> None:
    page = world.page
    for name in world.urls:
        page.open(world.urls[name])
        assert page.ask("[...document.querySelectorAll('th')].every((each) => each.scope)")
        assert page.ask("[...document.querySelectorAll('tbody tr')].every((row) => row.cells[0].scope === 'row')")
        assert page.ask("[...document.querySelectorAll('svg')].every((each) => each.getAttribute('aria-label').length > 5)")
        assert page.ask("document.querySelectorAll('main [aria-live=polite]').length") == 1
        assert page.ask("document.documentElement.lang") == "en"


def test_nothing_moves_for_those_who_asked_for_that(world: SimpleNamespace) -> None:
    page = world.page
    for reduced in (True, False):
        page.look(1280, reduced=reduced)
        page.open(world.urls[""])
        style = "(() => { const e = document.createElement('i'); e.className = 'state running'; document.body.append(e); "
        assert (page.ask(style + "return getComputedStyle(e).animationName })()") == "none") == reduced


@pytest.mark.parametrize("without_events", [False, True])
def test_an_open_page_follows_the_run_with_and_without_events(without_events: bool, world: SimpleNamespace) -> None:
    page = world.page
    page.look(1280)
    script = None
    if without_events:
        script = page.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.EventSource")["identifier"]
    try:
        page.open(world.urls["live"])
        page.ask("document.querySelector('summary').click()")
        page.until(f"document.getElementById('connection').textContent === '{'asks every 5 s' if without_events else 'live'}'")
        round = len((world.live / "metrics.jsonl").read_text().splitlines()) + 1
        add(world.live, "clients.jsonl", client(round, "north"), client(round, "south", "rejected", f"<b>reason {round}</b>"))
        add(world.live, "metrics.jsonl", metrics(round))
        page.until(f"document.getElementById('verdict').textContent.includes('running, round {round + 1} of 10')")
        page.until(f"document.getElementById('events').textContent.includes('<b>reason {round}</b>')")
        assert page.ask("document.querySelectorAll('b').length") == 0
        assert page.ask("document.querySelector('details').open")  # what was open stays open
    finally:
        if script:
            page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


# Counts what changes in the verdict from now on: a screen reader reads it out.
WATCHED = """(() => {
  window.changes = 0;
  const watch = new MutationObserver((all) => { window.changes += all.length; });
  watch.observe(document.getElementById("verdict"), { childList: true, characterData: true, subtree: true });
})()"""


def test_a_wait_is_named_and_is_not_read_out_again_every_second(world: SimpleNamespace) -> None:
    page, file = world.page, world.live / "status.json"
    round = len((world.live / "metrics.jsonl").read_text().splitlines()) + 1
    table = {"round": round, "began": time.time(), "heard": 0.0, "asked": 2, "missing": 1, "waiting_for": ["north"]}
    try:
        file.write_text(json.dumps(table))
        page.look(1280)
        page.open(world.urls["live"])
        page.until("document.getElementById('verdict').textContent.includes('waiting for north')")
        page.ask(WATCHED)
        for _ in range(4):
            file.write_text(json.dumps(table))  # as the run does while it waits
            time.sleep(1)
        assert page.ask("window.changes") == 0
        table["began"] -= 130
        file.write_text(json.dumps(table))
        page.until("document.getElementById('verdict').textContent.includes('waiting for north (2 min)')")
    finally:
        file.unlink()


def test_without_javascript_the_page_is_whole(world: SimpleNamespace) -> None:
    page = world.page
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.look(360)
        page.open(world.urls["many"])
        tree = page.call("DOM.getDocument", depth=-1)["root"]
        html = page.call("DOM.getOuterHTML", nodeId=tree["nodeId"])["outerHTML"]
        assert "Without JavaScript this page stays as it is" in html
        assert html.count("<tr>") > 200
        assert "stopped after round 3 of 10" in html or "running, round 4 of 10" in html
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_page_says_when_the_server_is_gone(tmp_path: Path, world: SimpleNamespace) -> None:
    make_run(tmp_path / "run")
    with served("run", cwd=tmp_path) as server:
        world.page.open(server.url)
        world.page.until("document.getElementById('connection').textContent === 'live'")
        os.kill(server.process.pid, 9)
        world.page.until("document.getElementById('connection').textContent.startsWith('no answer from the server')")
        assert world.page.ask("document.getElementById('connection').className") == "connection lost"
    world.page.open("about:blank")

// Keeps an open page as the server would make it now: events say that something changed, then the page is fetched again and
// its changed parts are put in place. Without events it asks every few seconds. All markup comes from the server, escaped.
"use strict";
(() => {
  const POLL_MS = 5000, SOON_MS = 250, SAFETY_MS = 60000, AGES_MS = 1000;
  const behind = Date.now() / 1000 - Number(document.body.dataset.now);  // of this clock against the server's
  const connection = document.getElementById("connection");
  const shown = new Map([...document.querySelectorAll("[data-part]")].map((part) => [part.id, part.innerHTML]));
  let timer = 0, loading = false, again = false, lastGood = Date.now();

  const say = (text, lost) => {
    if (connection.textContent !== text) connection.textContent = text;
    connection.classList.toggle("lost", lost);
  };

  const put = (part, html) => {
    const boxes = [...part.querySelectorAll(".scroll")].map((box) => [box.scrollLeft, box.scrollTop]);
    const open = [...part.querySelectorAll("details")].map((each) => each.open);
    const controls = "a, summary, [tabindex]";
    const focused = [...part.querySelectorAll(controls)].indexOf(document.activeElement);
    part.innerHTML = html;
    [...part.querySelectorAll("details")].forEach((each, place) => { each.open = open[place] ?? each.open; });
    [...part.querySelectorAll(".scroll")].forEach((box, place) => {
      if (boxes[place]) [box.scrollLeft, box.scrollTop] = boxes[place];
    });
    if (focused >= 0) part.querySelectorAll(controls)[focused]?.focus({ preventScroll: true });
  };

  const load = async () => {
    timer = 0;
    if (loading) { again = true; return; }
    loading = true;
    try {
      const answer = await fetch(location.href, { cache: "no-store", credentials: "same-origin" });
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of page.querySelectorAll("[data-part]")) {
        const here = document.getElementById(part.id);
        if (here && shown.get(part.id) !== part.innerHTML) {
          shown.set(part.id, part.innerHTML);
          put(here, part.innerHTML);
        }
      }
      const box = document.getElementById("box"), made = page.getElementById("box");
      if (box && made) box.className = made.className;
      document.title = page.title;
      lastGood = Date.now();
      if (polling) say("asks every 5 s", false);
    } catch {
      say(`no answer from the server: what you see is of ${new Date(lastGood).toLocaleTimeString()}`, true);
    } finally {
      loading = false;
      if (again) { again = false; soon(); }
    }
  };
  const soon = () => { timer = timer || setTimeout(load, SOON_MS); };

  let polling = 0;
  const poll = () => { polling = polling || setInterval(load, POLL_MS); load(); };

  const follow = () => {
    const source = new EventSource(document.body.dataset.events);
    for (const kind of ["round", "client", "verdict", "reset", "change"]) source.addEventListener(kind, soon);
    source.onopen = () => { say("live", false); soon(); };
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) poll();
      else say(`no answer from the server: what you see is of ${new Date(lastGood).toLocaleTimeString()}`, true);
    };
    setInterval(soon, SAFETY_MS);
  };

  const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const age = (seconds) => {
    const [size, unit] = UNITS.find(([size]) => seconds >= size) ?? [1, "s"];
    return `${Math.floor(Math.max(seconds, 0) / size)} ${unit} ago`;
  };
  setInterval(() => {
    const now = Date.now() / 1000 - behind;
    for (const each of document.querySelectorAll("time[data-at]")) {
      const text = age(now - Number(each.dataset.at));
      if (each.textContent !== text) each.textContent = text;
    }
  }, AGES_MS);

  if (window.EventSource) follow(); else poll();
})();

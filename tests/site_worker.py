"""A small site's worker, for tests: it has one site's files, and answers as a site does. `python site_worker.py SITE.json`.

The file has `name`, the site's own keys of `data` and `model`, and `deeds`: what it does wrong, by the kind of frame that it
answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from anyrank.worker import channel


def main() -> int:
    taken = channel.take_over().start()
    from anyrank.worker import serve

    return serve.serve(taken, Site(Path(sys.argv[1])))


class Site:
    """Answers for one site. A deed is `{kind of frame: [what, at the frame of this number, ...]}`; numbers are kept in a file,
    so that they go on in a worker that is started anew."""

    def __init__(self, path: Path) -> None:
        self.path, self.own = path, json.loads(path.read_text())
        self.held, self.method, self.kept = None, None, None

    def answer(self, frame, receive, progress) -> Iterator:
        from anyrank.errors import AnyRankError, FrameError
        from anyrank.messages import calls

        kind, run = frame.header.kind, frame.header.run
        deed = self.deed(kind)
        if deed in ("die", "hang"):
            self.end(deed)
        if deed == "refuse":
            yield calls.error_frame(FrameError(f"site: {kind} is refused"), run)
            return
        try:
            yield from getattr(self, f"on_{kind}")(frame, receive, deed)
        except FrameError:
            raise
        except AnyRankError as error:
            yield calls.error_frame(error, run)

    def end(self, how: str) -> None:
        if how == "hang":
            time.sleep(3600)
        os._exit(9)

    def deed(self, kind: str) -> str:
        what, *numbers = self.own.get("deeds", {}).get(kind, ["", -1])
        path = Path(f"{self.path}.{kind}")
        count = len(path.read_bytes()) if path.exists() else 0
        path.write_bytes(b"." * (count + 1))
        return what if count in numbers else ""

    def on_setup(self, frame, receive, deed) -> Iterator:
        from anyrank import methods
        from anyrank.config.tables import from_table
        from anyrank.messages import calls
        from anyrank.training.digest import base_digest
        from anyrank.worker import desk

        table, self.rank = calls.setup_of(frame)
        Path(f"{self.path}.setup.json").write_text(json.dumps(table))
        site = {"name": self.own["name"], "rank": 1, **self.own["data"]}
        config = from_table(table | {"model": table["model"] | self.own["model"], "sites": [site]})
        self.held = desk.load(config, self.rank, lambda done, total: None)
        self.method = methods.make(config.method.name, config.method.options)
        ready = replace(self.held.ready, base_digest=base_digest(self.held.model))
        public = replace(ready.roster.facts, base_model=table["model"]["name"])  # not the folder that it is in
        roster = replace(ready.roster, owners=None, by_label=None, facts=public)
        if "says" in self.own:
            roster = replace(roster, names=(self.own["says"],))
        if deed == "other count":
            roster = replace(roster, sizes=roster.sizes + 1)
        if deed == "other base":
            ready = replace(ready, base_digest="0" * 64)
        if deed == "other labels":
            roster = replace(roster, facts=replace(roster.facts, label_names=("x", "y", "z")))
        yield calls.ready_frame(replace(ready, roster=roster), frame.header.run)

    def on_start(self, frame, receive, deed) -> Iterator:
        from anyrank.messages import calls

        rank, scaling, seed = calls.start_of(frame)
        adapter = self.held.model.start(rank, scaling, seed + (deed == "other start"))
        adapter = replace(adapter, config=adapter.config | {"base_model_name_or_path": self.held.config.model.name or None})
        yield calls.adapter_frame(adapter, run=frame.header.run)

    def on_cohort(self, frame, receive, deed) -> Iterator:
        from anyrank.messages import calls
        from anyrank.messages.records import Code, Failure, Reported
        from anyrank.messages.wire import counts_frame, failure_frame, job_of, plan_of, update_frame
        from anyrank.training import trainer

        run, wanted, sent = frame.header.run, calls.cohort_of(frame), receive()
        assert (wanted.jobs, wanted.mechanism) == (1, None)
        job, plan = job_of(sent, self.own_parts(sent)), plan_of(sent)
        assert job.client.name == self.own["name"]
        if deed == "fail":
            yield failure_frame(
                Failure(job.client.name, Code.DIVERGED, "row 17 says: secret"), run, plan.round, with_reason=True
            )
            return
        scorer = self.held.scorer if wanted.score else None
        if wanted.train:
            (reply,) = trainer.train_cohort(
                self.held.model, [job], self.held.shards, plan, None, "never", wanted.deadline_s, scorer
            )
            if job.download.private:
                self.kept = reply.adapter
            answer = update_frame(reply, job.download, run, plan.round)
        elif not wanted.score:  # it is handed over
            answer = counts_frame(Reported(job.client.name, None), run, plan.round)
        else:
            (reply,) = trainer.score_cohort([job], self.held.scorer, wanted.deadline_s)
            answer = counts_frame(reply, run, plan.round)
        yield misled(answer, deed)

    def own_parts(self, frame):
        """Its own adapter of its last training, or what its method starts from."""
        from anyrank.messages import wire
        from anyrank.messages.records import Client, Scaling

        if not wire.absent(frame):
            return None
        lora, seed = self.held.config.lora, self.held.config.run.seed
        scaling = Scaling(lora.alpha, lora.scaling)
        state = self.method.init(self.held.model.start(self.rank, scaling, seed), scaling, seed)
        start = self.method.dispatch(replace(state, round=frame.header.round - 1), Client(**frame.header.body["client"]))
        return (self.kept or start.adapter) if start.private else start.adapter


def misled(frame, deed: str):
    """The frame with something wrong in its header."""
    header, body = frame.header, dict(frame.header.body)
    if deed == "other name":
        return replace(frame, header=replace(header, client="lakeside" if header.client != "lakeside" else "county"))
    if deed == "other round":
        return replace(frame, header=replace(header, round=header.round + 1))
    if deed == "other run":
        return replace(frame, header=replace(header, run="another"))
    if deed.startswith("counts "):
        return replace(frame, header=replace(header, body=body | {"counts": json.loads(deed.removeprefix("counts "))}))
    return frame


if __name__ == "__main__":
    sys.exit(main())

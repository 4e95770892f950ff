"""The worker of a site that does not trust the server beyond what its own file allows.

It has its own examples only. What it is asked is checked against its site file, its configuration and its own method object;
what does not fit is refused, with the reason in its own log and a code on the wire. What is private by the method stays in its
store. Under differential privacy it draws its own noise from the system's source, anew for each attempt, charges its own ledger
before it trains, and sends nothing but the noised release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anyrank.adapter.adapter import Adapter
from anyrank.errors import (
    AnyRankError,
    ConfigError,
    DataError,
    FrameError,
    MethodError,
    ModelError,
    RunError,
    RunFailed,
    in_a_line,
)
from anyrank.messages import calls, wire
from anyrank.messages.body import expect as expect_frame
from anyrank.messages.frame import Frame, from_bytes, to_bytes
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Code, Failure, Job, Reported, Scaling
from anyrank.privacy.grant import Grant, Release, Spent
from anyrank.privacy.noise import Mechanism
from anyrank.training import trainer
from anyrank.worker import results, sitechecks, siteload
from anyrank.worker.serve import now_and_then
from anyrank.worker.sitechecks import Refused, expect
from anyrank.worker.sitefile import SiteFile
from anyrank.worker.siteload import Held
from anyrank.worker.sitelog import SiteLog
from anyrank.worker.store import Store

Receive = Callable[[], Frame]
_ONE = 1  # job in a request: a site is one client


class SiteDesk:
    """Answers the frames of one site. Raises `RunError` if its store or its ledger is damaged, or in use."""

    def __init__(self, site: SiteFile) -> None:
        self.site, self.held = site, None
        folder = Path(site.store.folder)
        self.store = Store(folder, site.name, site.store.most_bytes, site.store.runs)
        try:
            self.grant = _grant(site)
            self.store.check_charges(self.grant.count)
        except BaseException:
            self.store.close()
            raise
        self.log = SiteLog(folder)

    def close(self) -> None:
        """Release the store and the model."""
        if self.held:
            self.held.model.close()
            self.held = None
        self.store.close()

    def answer(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        """The replies to a frame. Nothing that is sent raises an exception: what is wrong is an error frame, or a failure."""
        kinds = {calls.SETUP: self._setup, calls.START: self._start, calls.COHORT: self._cohort, calls.EVALUATE: self._evaluate}
        if frame.header.kind == wire.DOWNLOAD:  # of a request that was refused
            self.log.write("ignored", kind=frame.header.kind, bytes=frame.array_bytes)
            return
        try:
            expect_frame(frame, *kinds)
            yield from kinds[frame.header.kind](frame, receive, progress)
        except Refused as refused:
            self.log.write("refused", kind=frame.header.kind, run=frame.header.run, reason=str(refused))
            yield calls.error_frame(sitechecks.refusal(refused), frame.header.run)
        except FrameError as error:  # of what the server has sent
            self.log.write("refused", kind=frame.header.kind, run=frame.header.run, reason=str(error))
            yield calls.error_frame(FrameError("frame: is not what the site expected"), frame.header.run)
        except Exception as error:
            self.log.write("failed", kind=frame.header.kind, run=frame.header.run, reason=_in_full(error))
            yield calls.error_frame(_public(error), frame.header.run)

    # --- setup and start ---

    def _setup(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        table, largest_rank = calls.setup_of(frame)
        if self.held:
            self.held.model.close()
            self.held = None
        config = sitechecks.fitted(self.site, table, largest_rank)
        tell = now_and_then(progress, hundredths=True)
        self.held = held = siteload.load(self.site, frame.header.run, table, config, largest_rank, tell)
        self.log.write("ready", run=held.run, key=held.key, method=held.method.name, rank=held.rank, rounds=config.run.rounds)
        yield self._left(calls.ready_frame(siteload.ready(held), held.run))

    def _start(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        held = self._open(frame)
        asked, lora = calls.start_of(frame), held.config.lora
        rank, scaling, seed = asked
        expect(rank == held.largest_rank, "start.rank", held.largest_rank, rank)
        expect(scaling == Scaling(lora.alpha, lora.scaling), "start.scaling", f"{lora.alpha} {lora.scaling}", scaling)
        expect(seed == held.config.run.seed, "start.seed", held.config.run.seed, seed)
        start = held.model.start(rank, scaling, seed)
        config = {**start.config, "base_model_name_or_path": held.base_model or None}
        yield self._left(calls.adapter_frame(Adapter(start.layers, start.tensors, config), run=held.run))

    def _evaluate(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        """Results example by example would be the labels themselves."""
        raise Refused("evaluate", "a site reports no results example by example")
        yield

    def _open(self, frame: Frame) -> Held:
        if self.held is None:
            raise Refused("setup", "expected a setup frame first")
        expect(frame.header.run == self.held.run, "run", self.held.run, frame.header.run)
        return self.held

    # --- a round ---

    def _cohort(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        wanted = calls.cohort_of(frame)
        expect(wanted.jobs == _ONE, "cohort.jobs", _ONE, wanted.jobs)
        download = receive()
        yield self._left(self._reply(frame, wanted, download))

    def _reply(self, frame: Frame, wanted: calls.Cohort, download: Frame) -> Frame:
        """The reply to a request, whatever it is."""
        round = download.header.round
        try:
            return self._carried_out(self._open(frame), wanted, frame, download)
        except (Refused, Spent, AnyRankError) as error:
            self.log.write("refused", kind=wire.DOWNLOAD, run=frame.header.run, round=round, reason=str(error))
        except Exception as error:  # whatever a frame can lead to
            self.log.write("refused", kind=wire.DOWNLOAD, run=frame.header.run, round=round, reason=_in_full(error))
        return wire.failure_frame(Failure(self.site.name, Code.REFUSED), frame.header.run, round)

    def _carried_out(self, held: Held, wanted: calls.Cohort, frame: Frame, sent: Frame) -> Frame:
        expect_frame(sent, wire.DOWNLOAD, run=held.run, client=self.site.name)
        expect(wanted.mechanism is None, "cohort.mechanism", "none: the site has its own", "one")
        expect(
            sent.array_bytes <= self.site.limits.download_bytes, "download", self.site.limits.download_bytes, sent.array_bytes
        )
        plan = wire.plan_of(sent)
        sitechecks.check_plan(held.config, plan, wanted.train)
        over = plan.round > held.config.run.rounds
        scores = wanted.score and held.scorer is not None
        expect(wanted.train or over or scores, "cohort.train", "training: no scores leave here", "none")
        job = self._job(held, plan, sent)
        if not wanted.train:
            return self._handed_over(held, job, plan, wanted) if over else self._scored(held, job, plan, wanted)
        if held.privacy:
            return self._released(held, job, plan, _request(held, frame, sent))
        return self._trained(held, job, plan, wanted)

    def _job(self, held: Held, plan: Plan, sent: Frame) -> Job:
        """The job of a download's frame, checked, with what the site has itself."""
        client, own, form = wire.client_of(sent), None, None
        sitechecks.check_client(self.site, held.rank, held.largest_rank, client)
        if wire.absent(sent):
            form = sitechecks.expected_download(held.method, held.start, client, plan.round, Adapter({}))
            own = self._own(held, plan.round, form.adapter)
        job = wire.job_of(sent, own)
        expect(job.num_examples == held.declared, "num_examples", held.declared, job.num_examples)
        form = form or sitechecks.expected_download(held.method, held.start, client, plan.round, job.download.adapter)
        sitechecks.check_download(job.download, form)
        size = job.download.upload_bytes()
        expect(size <= self.site.limits.upload_bytes, "upload", self.site.limits.upload_bytes, size)
        return job

    def _own(self, held: Held, round: int, start: Adapter) -> Adapter:
        """What is not sent: private parts after the last training, everything else as the run's seed has it."""
        kept = self.store.own(held.key, round) if held.method.private else None
        if kept is None:
            return start
        private, layers = held.method.private, {}
        for name, layer in start.layers.items():
            A, B = (getattr(kept.layers[name] if factor in private else layer, factor) for factor in "AB")
            layers[name] = layer.with_factors(A, B)
        return Adapter(layers, kept.tensors if "tensors" in private else start.tensors, start.config)

    def _trained(self, held: Held, job: Job, plan: Plan, wanted: calls.Cohort) -> Frame:
        scorer = held.scorer if wanted.score else None
        reply = trainer.train(held.model, job, held.examples, plan, None, self._limit(wanted), scorer)
        if isinstance(reply, Failure):
            self.log.write("failed", kind="training", run=held.run, round=plan.round, code=reply.code.name, reason=reply.reason)
            return wire.failure_frame(reply, held.run, plan.round)
        if held.method.private:
            self.store.keep(held.key, plan.round, reply.adapter, {"run": held.run, "method": held.method.name})
        return wire.update_frame(reply, job.download, held.run, plan.round)

    def _scored(self, held: Held, job: Job, plan: Plan, wanted: calls.Cohort) -> Frame:
        (reply,) = trainer.score_cohort([job], held.scorer, self._limit(wanted))
        if isinstance(reply, Failure):
            self.log.write("failed", kind="scoring", run=held.run, round=plan.round, code=reply.code.name, reason=reply.reason)
            return wire.failure_frame(reply, held.run, plan.round)
        return wire.counts_frame(reply, held.run, plan.round)

    def _handed_over(self, held: Held, job: Job, plan: Plan, wanted: calls.Cohort) -> Frame:
        """Keep the model of the closing exchange, and reply with its scores, if the site reports any."""
        reply = self._scored(held, job, plan, wanted) if held.scorer and wanted.score else None
        reply = reply or wire.counts_frame(Reported(self.site.name, None), held.run, plan.round)
        counts = wire.counts_of(reply).counts if reply.header.kind == wire.COUNTS else None
        try:
            folder = results.keep(self.store, held, plan.round - 1, job.client.rank, job.download, counts)
        except AnyRankError as error:  # the scores are there all the same
            self.log.write("failed", kind="result", run=held.run, round=plan.round, reason=str(error))
            return reply if counts else wire.failure_frame(Failure(self.site.name, Code.CRASHED), held.run, plan.round)
        self.log.write("kept", kind="result", run=held.run, round=plan.round - 1, folder=str(folder))
        return reply

    def _limit(self, wanted: calls.Cohort) -> float:
        """Seconds for a job that is not private: the server may lower the site's own limit."""
        return min(self.site.limits.seconds, wanted.deadline_s or self.site.limits.seconds)

    def _released(self, held: Held, job: Job, plan: Plan, request: str) -> Frame:
        """A private reply: the one that was sent for the same request, or a new release, charged before it is made."""
        stored = self.store.reply(request)
        if stored is not None:
            return from_bytes(stored, len(stored))
        self.store.check_room(job.download.upload_bytes())  # a charge whose reply cannot be kept would be spent for nothing
        privacy = held.privacy
        spending = privacy.spending(held.declared, 1)
        release = Release(privacy.level, spending.sampling_rate, spending.noise_multiplier, spending.steps)
        about = {"run": held.run[:100], "key": held.key, "round": plan.round, "request": request}
        charge = self.grant.charge(release, about)
        try:
            made = self._made(held, job, plan)
            self.store.keep_reply(request, charge, to_bytes(made))
        except Exception as error:  # of which no more is said than that it happened
            self.log.write("failed", kind="training", run=held.run, round=plan.round, charge=charge, reason=_in_full(error))
            return wire.failure_frame(Failure(self.site.name, Code.PRIVATE), held.run, plan.round)
        self.log.write("charged", run=held.run, round=plan.round, charge=charge, epsilon=self.grant.spent())
        return made

    def _made(self, held: Held, job: Job, plan: Plan) -> Frame:
        """A release, with nothing beside it. Its time limit is the site's own: what ends in time depends on the examples."""
        way, limit = Mechanism(held.privacy), self.site.limits.seconds
        reply = trainer.train(held.model, job, held.examples, plan, way, limit)
        if not isinstance(reply, ClientUpdate):
            raise RunError(f"{reply.code.name}: {reply.reason}")
        bare = ClientUpdate(reply.adapter, held.declared, self.site.name)
        return wire.update_frame(bare, job.download, held.run, plan.round)

    # --- what leaves ---

    def _left(self, frame: Frame) -> Frame:
        """`frame`, noted before it is sent."""
        digest = to_bytes(frame)[-32:].hex()
        header = frame.header
        self.log.write("sent", kind=header.kind, run=header.run, round=header.round, bytes=frame.array_bytes, digest=digest)
        return frame


def spent(site: SiteFile) -> dict[str, Any]:
    """What of a site's privacy budget is spent, for its operator: `level`, `granted`, `delta`, `spent`, `charges`, `ledger`.

    Reads the ledger and writes nothing, also while a worker runs. Raises `RunError` for a damaged one.
    """
    return _grant(site, reading=True).table()


def _grant(site: SiteFile, reading: bool = False) -> Grant:
    asked = site.privacy
    return Grant(Path(site.store.folder), asked.level, asked.epsilon, asked.delta, reading)


def _request(held: Held, cohort: Frame, download: Frame) -> str:
    """The digest of a request: of the run's configuration, and of both frames, byte for byte."""
    total = hashlib.sha256(held.key.encode())
    for part in (str(held.config.run.rounds).encode(), to_bytes(cohort), to_bytes(download)):
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _public(error: Exception) -> AnyRankError:
    """An error as it may leave the site: what it is about, without names, paths or values."""
    about = {DataError: "data", ModelError: "model", MethodError: "method", RunError: "store", RunFailed: "store"}
    what = sitechecks.key_of(error) if isinstance(error, ConfigError) else about.get(type(error), "site")
    return RunError(f"{what}: the site cannot take part; its operator finds the reason in the site's log")


def _in_full(error: Exception) -> str:
    return str(error) if isinstance(error, AnyRankError) else in_a_line(error)

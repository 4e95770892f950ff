"""How a site starts the process of a job: as NVFlare does, but its end costs only this site.

NVFlare fails the whole job, for all sites, when the process of one site ends by a signal. This component, which the site's own
`local/resources.json` names as `process_launcher`, starts that process again, and reports no failure of the job.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle

MOST_STARTS = 4
_PAUSE_S = 1.0

log = logging.getLogger(__name__)


class Launcher(ClientProcessJobLauncher):
    """NVFlare's launcher of client processes, with handles that start them again."""

    def launch_job(self, job_meta: dict, fl_ctx: FLContext) -> JobHandleSpec:
        return Kept(lambda: super(Launcher, self).launch_job(job_meta, fl_ctx))


class Kept(JobHandleSpec):
    """A process that is started again when a signal ends it. `start` starts it, and gives NVFlare's handle of it."""

    def __init__(self, start: Callable[[], ProcessHandle]) -> None:
        super().__init__()
        self._start, self._now = start, start()
        self._ended = threading.Event()

    def terminate(self) -> None:
        self._ended.set()
        self._now.terminate()

    def poll(self) -> JobReturnCode:
        return JobReturnCode.SUCCESS if self._was_killed() else self._now.poll()

    def wait(self) -> None:
        for left in reversed(range(MOST_STARTS)):
            self._now.wait()
            if not self._was_killed() or not left or self._ended.wait(_PAUSE_S):
                return
            log.warning("the process of the job was ended by a signal; it is started again")
            self._now = self._start()

    def _was_killed(self) -> bool:
        """From outside, or because memory was short: no fault of the job."""
        code = self._now.adapter.poll()
        return code is not None and code < 0

"""The arrays of a site's reply, asked for piece by piece. No torch at import.

By itself NVFlare takes all arrays of a reply into memory as it decodes it: as many as the site sends. A site that is gone
in the middle of that ends the whole job. So the server's cell keeps references in the place of arrays, and these are asked for
here: no more than were declared, within the time that is left. What goes wrong is the end of that reply alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nvflare.apis.fl_constant import ServerCommandNames
from nvflare.app_common.np.np_downloader import download_arrays
from nvflare.fuel.f3.cellnet.defs import CellChannel
from nvflare.fuel.utils.fobs import dots
from nvflare.fuel.utils.fobs.decomposers.via_downloader import LazyDownloadRef

from anyrank.errors import FrameError
from anyrank.worker.supervisor import Late

_REQUEST_S = 30.0  # for one piece of at most 2 MB or one array; NVFlare asks three times
_PIECE_MOST = 1 << 24  # bytes of one array


def leave_references(cell: Any) -> None:
    """From now on replies to tasks come with references in the place of their arrays."""
    cell.decode_pass_through_topics.add((CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE))


@dataclass(eq=False)
class Fetch:
    """The transfer of one reply of at most `most` bytes until `until` (`time.monotonic`), `None` without an end."""

    most: int
    until: float | None
    given_up: threading.Event
    received: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    fault: str = ""

    @property
    def triggered(self) -> bool:
        """Whether NVFlare is to stop: it reads this as a signal."""
        return bool(self.fault) or self.given_up.is_set() or self.is_late

    @property
    def is_late(self) -> bool:
        return self.until is not None and time.monotonic() > self.until

    def take(self, arrays: Mapping[str, np.ndarray], **named: Any) -> dict[str, Any]:
        """Some arrays have come. What is returned would be kept by NVFlare, too."""
        for name, array in arrays.items() if not self.triggered else ():
            self.received += array.nbytes
            if array.nbytes > _PIECE_MOST or name in self.arrays:
                self.fault = f"expected arrays of at most {_PIECE_MOST} bytes, each once"
            elif self.received > self.most:
                self.fault = f"expected the {self.most} bytes that were declared, got more"
            else:
                self.arrays[name] = array
        if self.fault:
            self.arrays.clear()
        return {}


def fetch(cell: Any, source: str, parts: Any, wanted: Fetch) -> list[list[np.ndarray]]:
    """The arrays for the references in `parts`. `source`: the name of the site's process, from where alone they may come.

    Raises `Late`, and `FrameError` for anything else that goes wrong.
    """
    batch = _batch(parts, source)
    error, _ = download_arrays(
        source, batch, _REQUEST_S, cell, abort_signal=wanted, optional=True, arrays_received_cb=wanted.take
    )
    if wanted.is_late:
        raise Late("the site's reply did not arrive in time")
    if wanted.fault or error:
        raise FrameError(f"reply: {wanted.fault or 'its arrays did not arrive'}")
    return [[_take(wanted.arrays, ref) for ref in part] for part in parts]


def _batch(parts: Any, source: str) -> str:
    """The one batch that all references are of."""
    if not isinstance(parts, list) or not parts or not all(isinstance(part, list) and part for part in parts):
        raise FrameError("reply: expected lists of arrays, got something else")
    references = [ref for part in parts for ref in part]
    if not all(type(ref) is LazyDownloadRef and ref.dot == dots.NUMPY_DOWNLOAD and ref.fqcn == source for ref in references):
        raise FrameError("reply: expected arrays from the site itself, got something else")
    batches = {ref.ref_id for ref in references}
    if len(batches) > 1 or len({ref.item_id for ref in references}) < len(references):
        raise FrameError("reply: expected each array once, and all together, got something else")
    return batches.pop()


def _take(arrays: dict[str, np.ndarray], ref: LazyDownloadRef) -> np.ndarray:
    if ref.item_id not in arrays:
        raise FrameError("reply: expected all of its arrays, got fewer")
    return arrays.pop(ref.item_id)

"""`python -m anyrank.worker`: answer the frames that come over stdin, on stdout, until stdin ends."""

from __future__ import annotations

import sys


def main() -> int:
    from anyrank.worker import channel

    taken = channel.take_over()  # before anything is imported that may print
    from anyrank.worker import serve
    from anyrank.worker.desk import Desk

    return serve.serve(taken, Desk())


if __name__ == "__main__":
    sys.exit(main())

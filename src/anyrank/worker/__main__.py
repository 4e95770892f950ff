"""`python -m anyrank.worker [--site FILE]`: answer the frames that come over stdin, on stdout, until stdin ends.

Without `--site`, a worker of the user who runs the server, on the same machine. With it, the worker of a site, which does what
its own file allows. Exit status 2: the site file, or the site's store, cannot be used; one line on stderr says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_USAGE = "usage: python -m anyrank.worker [--site FILE]"


def main(words: Sequence[str]) -> int:
    if words and (len(words) != 2 or words[0] != "--site"):
        print(_USAGE, file=sys.stderr)
        return 2
    if words:
        from anyrank.worker import sitemain

        return sitemain.main(words[1])
    from anyrank.worker import channel

    taken = channel.take_over().start()  # before anything is imported that may print
    from anyrank.worker import serve
    from anyrank.worker.desk import Desk

    return serve.serve(taken, Desk())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

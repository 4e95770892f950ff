"""The command's outermost frame: how it ends. It is light, so that signals are caught before anything else is imported."""

from __future__ import annotations

import sys

from anyrank import stopping

# How to continue after a command that was stopped, by its verb.
_GO_ON = {
    "run": "go on with the same command and --resume",
    "compare": "go on with the same command and --resume",
    "study": "go on with the same command: it keeps what is finished",
    "deploy": "a run that was submitted goes on; anyrank deploy status shows it",
    "serve": "the runs go on; give the same command again to see them",
    "demo": "give the same command again: it starts anew",
}
_AGAIN = "nothing is left of it; give the same command again"
_NAMES = {2: "Ctrl-C", 15: "SIGTERM"}


def main() -> None:
    """The command `anyrank`: exit 0 done, 1 the run failed, 2 the request is wrong, 130 or 143 stopped by Ctrl-C or SIGTERM.

    One line on stderr for each of them but the first.
    """
    stopping.on_signals(_stopped)
    status, line = _called()
    stopping.no_more()
    if line:
        sys.stderr.write(f"anyrank: {line}\n")
    sys.exit(status)


def _stopped(number: int) -> str:
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return f"anyrank: stopped by {_NAMES.get(number, f'signal {number}')}; {_GO_ON.get(verb, _AGAIN)}"


def _called() -> tuple[int, str]:
    """Exit status of the command that was typed, and the line that goes with it."""
    import typer

    from anyrank.cli.verbs import app
    from anyrank.errors import AnyRankError, RunFailed

    usage_error = typer.BadParameter.__bases__[0]  # versions of Typer differ in where it comes from
    try:
        return app(standalone_mode=False) or 0, ""
    except AnyRankError as error:
        return 1 if isinstance(error, RunFailed) else 2, str(error)
    except usage_error as error:
        return 2, _usage(error)


def _usage(error) -> str:
    """A wrong call in one line; a call without a verb gets the help."""
    from anyrank.errors import printable

    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return ""
    verb = _verb(error.ctx)
    text = printable(" ".join(error.format_message().split()).rstrip("."))
    return f"{f'{verb}: ' if verb else ''}{text}; see anyrank {f'{verb} ' if verb else ''}--help"


def _verb(context) -> str:
    """The verb of a call, with those that it is below: `deploy submit`. Empty for the command itself."""
    names = []
    while context and context.parent:
        names.append(context.info_name)
        context = context.parent
    return " ".join(reversed(names))

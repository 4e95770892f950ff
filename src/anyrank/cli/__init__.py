"""The command line."""

from anyrank.cli.verbs import app, main

__all__ = ["app", "main"]

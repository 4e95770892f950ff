"""A federation over sites that keep their data, from the server's side."""

from typing import Any

__all__ = ["federate"]


def __getattr__(name: str) -> Any:
    """What is handed on is loaded when it is asked for, so that `deployment.nvflare` is found without torch."""
    if name == "federate":
        from anyrank.deployment.running import federate

        return federate
    raise AttributeError(name)

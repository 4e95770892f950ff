"""A federation over sites that keep their data, from the server's side."""

from typing import Any

__all__ = ["federate", "public"]


def __getattr__(name: str) -> Any:
    """What is handed on is loaded when it is asked for, so that `deployment.nvflare` is found without torch."""
    if name == "federate":
        from anyrank.deployment.running import federate

        return federate
    if name == "public":
        from anyrank.deployment.public import public

        return public
    raise AttributeError(name)

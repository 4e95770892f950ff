"""A federation over sites that keep their data, from the server's side."""

from anyrank.deployment.public import public
from anyrank.deployment.running import federate

__all__ = ["federate", "public"]

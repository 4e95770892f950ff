"""Pages from templates. Everything that a run folder says is text: it is escaped, and its control characters are shown."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from anyrank.errors import printable

_HERE = Path(__file__).parent


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of this folder, compiled once."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )


def static(name: str) -> bytes:
    """A file of this folder that is sent as it is."""
    return (_HERE / name).read_bytes()

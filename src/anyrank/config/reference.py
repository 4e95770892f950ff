"""docs/configuration.md, made from the keys themselves: `python -m anyrank.config.reference > docs/configuration.md`."""

from __future__ import annotations

import sys

from anyrank.config.explain import Key, keys, sections

_TOP = """# Configuration

A run is one TOML file; every key has a default, and an unknown key stops with the nearest known one. `anyrank explain KEY`
prints a row of these tables (`anyrank explain lora.alpha`), `anyrank explain lora` a section, and `anyrank explain lora_alpha`
finds what another library's name is called here. `--set section.key=value` overrides a key for one command.

This page is made from the code, by `python -m anyrank.config.reference > docs/configuration.md`, and a test compares the two.
"""
_HEAD = "| key | is | type | values | default | elsewhere |\n| --- | --- | --- | --- | --- | --- |\n"


def page() -> str:
    """The whole page."""
    parts = [_TOP]
    for section, doc in sections().items():
        rows = [_row(key) for key in keys() if key.section == section]
        parts.append(f"## [{section}]\n\n{doc}\n\n{_HEAD}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    values = key.takes if isinstance(key.values, str) else _code(key.takes)
    cells = (f"`{key.name}`", f"{key.doc} {key.limits}".strip(), key.type, values, _code(key.usual), key.elsewhere)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    sys.stdout.write(page())

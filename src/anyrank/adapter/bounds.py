"""How much of what others wrote is read: enough for every adapter that is one, and too little to take a machine's time."""

from __future__ import annotations

CONFIG_BYTES = 16 << 20  # of adapter_config.json; a pattern for each of 100,000 modules takes 10 MB
CONFIG_DEPTH = 32  # tables within tables
PATTERN_CHARS = 10_000  # of one name pattern
PATTERN_WORK, PATTERN_WORK_OF_A_NAME = 500_000, 2_000  # steps of all patterns of an adapter: at most 1 s, and 3 ms a layer

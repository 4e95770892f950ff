"""Loaded first by each Python process that has this folder in PYTHONPATH: makes it do what `flare_deeds` has for it."""

import os

if os.environ.get("ANYRANK_TEST_DEEDS"):
    import flare_deeds

    flare_deeds.install()

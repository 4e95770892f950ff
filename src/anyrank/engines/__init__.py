"""Where clients run. The in-process engine is here; others follow the same `Engine` protocol."""

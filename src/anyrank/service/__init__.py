"""The status page of runs: a read-only web service, made from run folders alone. It loads no torch."""

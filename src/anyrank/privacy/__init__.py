"""Private training: one frozen plan for a run, the noise that it needs, and the ledger of what each client has spent."""

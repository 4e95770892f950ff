"""The parties of a federation over real machines: their kits, checks, processes, and commands to the server."""

"""Frames over Flower: the server's round loop in a ServerApp, and at each site a small ClientApp beside a lasting worker."""

"""The keys that a site's node has in Flower's node configuration: the site's name, and where its attendant listens."""

NAME, SOCKET = "anyrank-name", "anyrank-socket"

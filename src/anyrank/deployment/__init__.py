"""A federation over sites that keep their data: the server has neither examples nor base weights."""

"""Mesh, sharding rules and placement of arrays."""

"""Mesh, parameter declarations, sharding rules and shardings."""

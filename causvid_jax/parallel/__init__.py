"""Many devices: the mesh, where every array lies on it, start-up on many hosts."""

"""Many devices: the mesh, where every array lies on it, and compilation for machines that are not at hand."""

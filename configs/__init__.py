"""One file per recipe, each with ``get_config()``."""

"""One recipe per file: ``get_config`` returns the whole road of one model."""

"""Start, join and watch many processes."""

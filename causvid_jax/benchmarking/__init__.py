"""How fast the streaming sampler is on the device at hand, and what share of the device that is."""

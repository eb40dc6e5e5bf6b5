"""Live films: streams that take commands while they run, and the server with its page.

``programs``, ``film`` and ``fragments`` need no extra; ``sample --replay`` uses them. The other modules need the extra
``serve``.
"""

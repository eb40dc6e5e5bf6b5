"""Live films: streams that listen while they run, and the server that brings them to a page.

``programs``, ``film`` and ``fragments`` need the package alone; ``sample --replay`` uses them. The rest
needs the extra ``serve``.
"""

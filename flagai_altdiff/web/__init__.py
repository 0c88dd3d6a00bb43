"""Where people meet the models: a page, three HTTP interfaces, a queue, and processes that draw.

``altdiff serve`` and ``altdiff ui`` start it; :mod:`flagai_altdiff.web.app` puts its parts together.
"""

"""Generation of videos by the options of `c2r.generate`, which `c2r.evaluate` and the page of `c2r.app` share.

Modules that take seconds to import are imported inside functions, because a command has to answer --help at once.
"""

"""Measuring: cases, interleaved timing against what a user would run instead, results files.

``tessella bench FAMILY`` runs a family's cases and writes bench/results/<device>/<family>.json;
``tessella bench report`` makes tables and plots from those files, and nothing else does.
"""


class BenchError(ValueError):
    """A bench that cannot be run as asked; the message says what can."""

# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a bench."""


class BenchError(Exception):
    """The bench could not be run; says what was tried and what to do."""


class Skipped(Exception):  # noqa: N818
    """This machine lacks what one bench needs; says what."""

# SPDX-License-Identifier: Apache-2.0
"""The one exception of the guest harness."""


class GuestError(RuntimeError):
    """Something about a test guest failed; the text says what was tried, what came back and what to do."""

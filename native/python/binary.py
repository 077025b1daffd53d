# SPDX-License-Identifier: Apache-2.0
"""Where the pager's program lies."""

from __future__ import annotations

from pathlib import Path

from frostline.native import _frostline


def pager_path() -> Path:
    """``frostline-pager`` as installed beside the extension; raises FileNotFoundError when it is not there."""
    path = Path(_frostline.__file__).parent / "bin" / "frostline-pager"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; build the native part, or name another pager with --pager")
    return path

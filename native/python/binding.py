# SPDX-License-Identifier: Apache-2.0
"""The one module that imports the extension, and the one function that turns return codes into exceptions."""

from __future__ import annotations

import os
from typing import Any, Final

from frostline.native import _frostline

__all__ = ["NativeError", "check", "ffi", "lib", "text"]

# Structs have the fields of frostline.h, of which no type checker knows.
ffi: Final[Any] = _frostline.ffi
lib: Final[Any] = _frostline.lib


class NativeError(OSError):
    """A call of the C library failed; ``errno`` is the system's number."""


def check(result: int, tried: str) -> int:
    """Give ``result`` back, or raise NativeError when it is a negative errno; ``tried`` says what was tried on what."""
    if result >= 0:
        return result
    raise NativeError(-result, f"{tried}: {os.strerror(-result)}")


def text(chars: Any) -> str:
    """A C string as str; bytes that are not UTF-8 are replaced, for they are only shown to people."""
    raw: bytes = ffi.string(chars)
    return raw.decode("utf-8", "replace")

# SPDX-License-Identifier: Apache-2.0
from typing import Any

from _cffi_backend import FFI

ffi: FFI
# One attribute for each function and constant of frostline.h.
lib: Any

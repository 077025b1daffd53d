# SPDX-License-Identifier: Apache-2.0
"""The declarations that cffi gets are those of the header, less what cffi cannot read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cffi import FFI

ROOT = Path(__file__).resolve().parents[3]
CDEF = ROOT / "native" / "cmake" / "cdef.py"

HEADER = """\
#ifndef SAMPLE_H
#define SAMPLE_H
#include <stdint.h>
#include <stddef.h>
#define FL_COUNT 4
#define FL_FLAG (UINT64_C(1) << 40)
#define FL_BOTH (FL_COUNT | FL_SECOND)
#define FL_NAME "text"
#define FL_MAX(a, b) ((a) > (b) ? (a) : (b))
#define FL_HIDDEN __attribute__((visibility("hidden")))
enum fl_kind { FL_FIRST = 1, FL_SECOND = 1 << 1 };
struct fl_item {
    uint64_t bytes; /* ends in a brace } */
    uint32_t bins[FL_COUNT];
    union { int32_t left; uint32_t right; };
};
_Static_assert(sizeof(struct fl_item) == 32, "layout (a parenthesis in here)");
static inline int fl_twice(int x) { if (x) { return 2 * x; } return 0; }
FL_HIDDEN int fl_open(const char *restrict path, struct fl_item *out) __attribute__((warn_unused_result));
typedef void (*fl_callback)(void *context, size_t length);
int fl_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
#endif
"""


def run_cdef(header: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CDEF), "--cc", "cc", str(header), str(output)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def cdef(tmp_path: Path) -> str:
    header = tmp_path / "sample.h"
    header.write_text(HEADER, encoding="utf-8")
    output = tmp_path / "sample.cdef"
    run = run_cdef(header, output)
    assert run.returncode == 0, run.stderr
    return output.read_text(encoding="utf-8")


def test_cffi_reads_it(cdef: str) -> None:
    FFI().cdef(cdef)


def test_types_are_those_of_the_header(cdef: str) -> None:
    ffi = FFI()
    ffi.cdef(cdef)
    assert ffi.sizeof("struct fl_item") == 32
    assert ffi.offsetof("struct fl_item", "bins") == 8


def test_integer_constants_are_left_to_the_compiler(cdef: str) -> None:
    constants = [line for line in cdef.splitlines() if line.startswith("#define")]
    assert constants == ["#define FL_COUNT ...", "#define FL_FLAG ...", "#define FL_BOTH ..."]


def test_nothing_of_the_system_headers_is_in_it(cdef: str) -> None:
    assert "int_least8_t" not in cdef
    assert "fl_twice" not in cdef


def test_the_real_header_is_readable(tmp_path: Path) -> None:
    output = tmp_path / "frostline.cdef"
    run = run_cdef(ROOT / "native" / "include" / "frostline.h", output)
    assert run.returncode == 0, run.stderr
    ffi = FFI()
    ffi.cdef(output.read_text(encoding="utf-8"))
    assert ffi.typeof("const char *(*)(void)") is not None


def test_a_header_that_does_not_compile_is_named(tmp_path: Path) -> None:
    header = tmp_path / "broken.h"
    header.write_text('#include "not/there.h"\n', encoding="utf-8")
    run = run_cdef(header, tmp_path / "broken.cdef")
    assert run.returncode != 0
    assert "broken.h" in run.stderr
    assert "not/there.h" in run.stderr

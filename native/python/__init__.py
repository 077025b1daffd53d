# SPDX-License-Identifier: Apache-2.0
"""The C library from Python: inspect a VMM, view a vault, command a pager.

Sizes are bytes, times nanoseconds of CLOCK_BOOTTIME unless a name says otherwise. Every failure of the library
is a NativeError (an OSError) that says what was tried, on what, and what the system said.
"""

from __future__ import annotations

from frostline.native.binding import NativeError
from frostline.native.constants import (
    AGE_BIN_EDGES,
    AGE_BINS,
    LATENCY_BUCKET_EDGES_NS,
    PAGE_BYTES,
    CommandKind,
    Freeze,
    PagerExit,
    RecordKind,
    Refusal,
    State,
    Tracker,
    Why,
)
from frostline.native.inspection import (
    Inspection,
    KernelFeatures,
    Region,
    TrackerProbe,
    inspect,
    library_version,
    probe_kernel,
    probe_trackers,
    tidy_host,
)
from frostline.native.pager import Command, Pager, Reply
from frostline.native.view import Record, Status, View, latency_percentile_ns

__all__ = [
    "AGE_BINS",
    "AGE_BIN_EDGES",
    "LATENCY_BUCKET_EDGES_NS",
    "PAGE_BYTES",
    "Command",
    "CommandKind",
    "Freeze",
    "Inspection",
    "KernelFeatures",
    "NativeError",
    "Pager",
    "PagerExit",
    "Record",
    "RecordKind",
    "Refusal",
    "Region",
    "Reply",
    "State",
    "Status",
    "Tracker",
    "TrackerProbe",
    "View",
    "Why",
    "inspect",
    "latency_percentile_ns",
    "library_version",
    "probe_kernel",
    "probe_trackers",
    "tidy_host",
]

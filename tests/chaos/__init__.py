# SPDX-License-Identifier: Apache-2.0
"""Tests that kill, cut off and corrupt."""

# SPDX-License-Identifier: Apache-2.0
"""Tests of what builds and installs Frostline."""

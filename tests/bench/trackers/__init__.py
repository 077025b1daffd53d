# SPDX-License-Identifier: Apache-2.0
"""The trackers side by side: what each costs whom, and how exact it is (``make bench-trackers``)."""

# SPDX-License-Identifier: Apache-2.0
"""The per-host daemon: finds VMs, tracks and evicts their cold pages, reports to the controller."""

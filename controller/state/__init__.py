# SPDX-License-Identifier: Apache-2.0
"""What outlives the controller: policies, epoch, freezes, decisions and audit log in Redis.

Losing it costs history, never safety: everything that is in force is in memory, too, and is put back.
"""

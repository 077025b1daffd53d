# SPDX-License-Identifier: Apache-2.0
"""The fleet service: sessions with agents, policy, state, the operator's API."""

# SPDX-License-Identifier: Apache-2.0
"""What operators and their tools call."""

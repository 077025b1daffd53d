# SPDX-License-Identifier: Apache-2.0
"""Everything that holds Frostline to its promises."""

# SPDX-License-Identifier: Apache-2.0
"""What the controller tells of itself in numbers."""

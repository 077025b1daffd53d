# SPDX-License-Identifier: Apache-2.0
"""What the controller knows of the fleet right now. Lives in memory and is rebuilt from the agents' reports."""

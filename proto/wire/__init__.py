# SPDX-License-Identifier: Apache-2.0
"""What agent and controller share: channels, credentials, telemetry set-up."""

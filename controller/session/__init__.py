# SPDX-License-Identifier: Apache-2.0
"""The agents' side of the controller: streams, what may come in through them, and the budgets that go out."""

# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the whole loop on two real Linux guests, told while it happens."""

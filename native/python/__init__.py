# SPDX-License-Identifier: Apache-2.0
"""The binding of the C library: the one package that imports the extension."""

# SPDX-License-Identifier: Apache-2.0
"""What each VM may have away, as a pure function of the policy document and of what was reported.

Nothing here knows of gRPC, Redis or the clock, so that plan mode, enforcement and tests run the same code.
README.md in this folder is the reference of the document.
"""

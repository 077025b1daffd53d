# SPDX-License-Identifier: Apache-2.0
"""Figures, each as a ratio of two sides measured in the same run: ``python -m tests.bench``."""

"""Reads finished runs: comparisons, statistics and pictures."""

"""Tests: they mirror the source, and `tests.oracle` holds the recurrence in float64."""

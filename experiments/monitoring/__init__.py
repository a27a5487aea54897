"""Alarms of the monitor on streams with and without a change."""

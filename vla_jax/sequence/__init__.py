"""Spans, layouts and the one rule of sight."""

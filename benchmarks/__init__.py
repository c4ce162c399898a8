"""Measurements of this library and its peers, side by side. Nothing here is a test."""

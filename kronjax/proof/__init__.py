"""Bounds from below, and Newton's method to a strict local minimum."""

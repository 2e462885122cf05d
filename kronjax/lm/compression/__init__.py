"""Moments, plans, fits and records: how a model becomes smaller."""

"""Lower bounds, certificates, and Newton's method to a strict local minimum."""

"""Sums of Kronecker products that stand for operators: preconditioners."""

"""Dense linear algebra on arrays: Schatten norms, spectral norms, decompositions."""

"""Perplexity protocols, latency, spectra, and the evaluation harness."""

"""The language models themselves, and what can be computed with any of them."""

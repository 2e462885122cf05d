"""Text in: documents, tokenizers and blocks of tokens."""

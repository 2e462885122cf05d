"""Text: documents, tokenizers, chat templates and blocks of tokens."""

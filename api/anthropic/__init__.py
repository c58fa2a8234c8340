"""Anthropic's protocol: message batches."""

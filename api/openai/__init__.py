"""OpenAI's protocol: files, and batches of them."""

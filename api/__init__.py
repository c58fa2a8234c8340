"""The HTTP door: native jobs and batches, waiting calls, webhooks, metrics."""

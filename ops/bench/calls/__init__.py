"""The benchmark of calls: mimoq beside bare loops, SDKs and plain Celery, as ratios of one run."""

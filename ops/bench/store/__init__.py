"""`make bench-store`: what bulk submits, a million queued jobs, exports and start-up take."""

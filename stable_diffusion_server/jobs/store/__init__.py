"""Durable store of jobs, idempotency keys and webhook messages (SQLite)."""

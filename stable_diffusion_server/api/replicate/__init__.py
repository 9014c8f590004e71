"""Replicate's HTTP API: predictions over our jobs."""

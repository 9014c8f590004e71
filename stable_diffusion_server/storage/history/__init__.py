"""Searchable index of generated images, stored separately from the bucket."""

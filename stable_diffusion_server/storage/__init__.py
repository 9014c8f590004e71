"""Object storage: backends, write-behind, existence cache, signed URLs, history index."""

"""HTML fragments: progress, image details, status page."""

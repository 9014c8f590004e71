"""Pictures finished but not yet in the bucket: kept on disk, and brought there in the background."""

"""Cloudflare R2, AWS and every other store with the S3 interface."""

"""The studio: pages in the browser over the server's own HTTP API. Knows no models, no buckets and no devices."""

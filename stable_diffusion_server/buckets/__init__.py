"""One module per kind of storage, each keeping the promises of `bucket_api.Bucket`; strangers to one another."""

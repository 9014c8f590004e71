"""What was drawn here, to be listed and searched: an index beside the bucket, which no picture depends on."""

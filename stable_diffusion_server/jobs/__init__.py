"""The life of a job: accepted, drawn when its turn comes, followed, cancelled, told. Knows no HTTP and no torch."""

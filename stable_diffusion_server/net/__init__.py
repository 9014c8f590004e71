"""Remote pictures to bytes: `targets` reads URLs, `addresses` judges what they resolve to, `fetcher` dials."""

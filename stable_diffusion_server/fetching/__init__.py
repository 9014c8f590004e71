"""Remote pictures to bytes: `targets` judges addresses, `fetcher` dials them."""

"""The doors: HTTP in, orders down, receipts up. Knows nothing of devices."""

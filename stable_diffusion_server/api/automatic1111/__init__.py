"""The doors of AUTOMATIC1111's API: its parameters and answers over the same orders. Knows no devices."""

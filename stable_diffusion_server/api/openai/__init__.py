"""The doors of the OpenAI Images API: its parameters and answers over the same orders. Knows no devices."""

"""Wire types of the native API: request parameters and response bodies."""

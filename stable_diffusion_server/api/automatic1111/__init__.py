"""The API of AUTOMATIC1111: its routes, parameters and responses over the same generation service."""

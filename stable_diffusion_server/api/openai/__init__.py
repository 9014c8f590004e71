"""The OpenAI Images API: its routes, parameters and responses over the same generation service."""

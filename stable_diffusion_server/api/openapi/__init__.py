"""The OpenAPI document and the page that shows it. Draws nothing."""

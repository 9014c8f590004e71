"""The Model Context Protocol: tools for agents, which call our own routes."""

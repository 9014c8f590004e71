"""ASGI middleware of every request: proxies, hosts, origins, API keys, rate limits, header and body sizes."""

"""What every request passes before the doors: proxies, hosts, origins, keys, rates, sizes. Knows no parameters."""

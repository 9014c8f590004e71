"""Ways to run the server elsewhere: Ray Serve, containers, systemd, Kubernetes. The package knows none of them."""

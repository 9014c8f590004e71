"""Ways to deploy the server: Ray Serve, containers, systemd, Kubernetes. The package imports none of them."""

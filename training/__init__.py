"""How the embedded models were made, end to end; the server never imports this package."""

"""How the gateway speaks with one replica of inference."""

"""Key management services, behind the port `services.auth.signing.master_key.KeyManagement`."""

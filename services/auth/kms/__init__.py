"""Key management services, behind the port `services.auth.master_key.KeyManagement`."""

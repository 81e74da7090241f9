"""The tenants' door: one address that routes every request to the best replica of its model."""

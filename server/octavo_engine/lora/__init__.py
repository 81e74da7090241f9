"""Low-rank adapters: many beside one base model, mixed in one batch, loaded and unloaded while the engine runs."""

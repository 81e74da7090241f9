"""Steps on their way through the device: launched, chosen from, collected, and computed again when one fails."""

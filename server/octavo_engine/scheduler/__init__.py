"""Which tokens of which sequences the next step computes. Pure: no IO, and no clock but the one passed in."""

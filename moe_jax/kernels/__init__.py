"""The only rooms that know Pallas: one floor per GPU generation."""

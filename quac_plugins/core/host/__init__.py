"""Facts about hosts of any framework."""

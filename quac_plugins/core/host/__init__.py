"""What is known of a host, whatever framework it is of."""

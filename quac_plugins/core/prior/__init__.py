"""The deep degradation prior: small modules after shallow layers of a frozen host, and where they can go."""

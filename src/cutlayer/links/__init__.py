"""How a party is reached; the driver cannot tell which link it uses."""

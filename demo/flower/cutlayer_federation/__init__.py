"""A run of cutlayer in a Flower federation."""

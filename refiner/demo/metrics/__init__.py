"""What is in a clip of the synthetic world, found from its pixels alone, and how good that is."""

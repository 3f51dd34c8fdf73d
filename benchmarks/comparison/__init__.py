"""What `benchmarks.engine` compares: the service's engine and the recipe it replaces, on the same weights. No Ray."""

"""Model registry, weights, label maps and model folders."""

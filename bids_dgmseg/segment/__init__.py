"""From a Model and a Volume to probabilities and labels."""

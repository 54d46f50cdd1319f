"""Network architectures as plain ``torch.nn`` modules, one module per paper."""

"""GPU kernels in Triton, one module per chapter; imported only when they are used."""

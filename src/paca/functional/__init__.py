"""The autograd functions: plain tensors in, plain tensors out."""

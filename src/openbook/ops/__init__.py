"""The arithmetic a model is made of: a protocol, and the backends that implement it."""

"""Training data: documents with a record each, mixed by weights, packed into rows, written as shards, read back."""

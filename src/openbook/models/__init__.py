"""Model families, one readable file each, written against Ops and AttentionContext."""

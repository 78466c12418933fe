"""Parts that families share."""

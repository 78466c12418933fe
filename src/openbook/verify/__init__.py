"""Checks of a release that need no trust in whoever made it."""

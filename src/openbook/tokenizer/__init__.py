"""Text to token ids and back: training, encoding, chat rendering, reasoning parsing."""

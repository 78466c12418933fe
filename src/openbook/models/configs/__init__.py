"""The shapes of single families and how their config.json says them. No torch here: the models are one folder up."""

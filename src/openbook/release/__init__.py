"""What a build ends with: a folder of weights and the evidence for them."""

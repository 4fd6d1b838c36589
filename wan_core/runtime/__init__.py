"""What the training loop needs from the machine."""

"""The DiT: its forward pass over any module tree that has the checkpoints' names, by chunks of tokens."""

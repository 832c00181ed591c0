"""The VAE: its operations, their passes over frames, and exact tiles of them."""

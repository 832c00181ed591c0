"""Trained toys: tiny Wan2.1 models that show what the prompt says, their data and their training."""

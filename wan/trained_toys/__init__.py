"""Trained toys: the checkpoints of tiny Wan2.1 models that show what the prompt says. `toys` trains them."""

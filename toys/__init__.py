"""Trains the toys, tiny Wan2.1 models that show what the prompt says, and measures and draws their videos."""

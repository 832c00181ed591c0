"""Text to video, 14B parameters."""

from .shared_config import model_config

t2v_14B = model_config("Wan T2V 14B", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

"""Text to video, 1.3B parameters."""

from .shared_config import model_config

t2v_1_3B = model_config("Wan T2V 1.3B", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)

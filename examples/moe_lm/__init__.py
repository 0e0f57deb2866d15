"""A byte-level language model with Mixture-of-Experts layers, and what it takes to train it: see `train_moe_lm.py`."""

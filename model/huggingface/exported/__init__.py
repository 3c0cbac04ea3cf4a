"""The model as `transformers` loads it: files that an export copies beside the weights (`trust_remote_code`).

They import torch and transformers only, never this project: an exported folder works where it is not installed.
"""

"""Checkpoints made by other programs, in and out.

A file is opened by its container (`torch_pickle`, `safetensors_file`, `rwkv_cpp`), which `formats` tells by content; its tensors get
their official names (`huggingface`), are checked against the model's declaration and put on devices (`official`), and the same way
back (`write`). Nothing is read before it is needed. `python -m rwkv_jax.convert IN OUT` does both.
"""

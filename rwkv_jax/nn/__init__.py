"""What all versions of RWKV share between their blocks."""

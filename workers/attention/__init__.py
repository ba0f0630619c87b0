"""Attention over the paged device pool of a rank.

`pool.py` is the memory, `packing.py` turns a ForwardBatch into tensors, `fast.py` and `exact.py` plan and run
the attention of one batch in their mode, `interface.py` is the one function that transformers' models call.
"""

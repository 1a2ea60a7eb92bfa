"""Speed of a model on this machine, with llama-bench's names: `pp512` prefills 512 tokens, `tg128` generates 128.

And that of a server under load (`serving`), by a client that loads nothing of what computes.
"""

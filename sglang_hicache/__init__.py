"""HiCache server: an LLM server with a three-tier KV cache whose storage changes while it serves."""

__version__ = "0.1.0"

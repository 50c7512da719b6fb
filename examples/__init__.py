"""Programs that show what paddle-fused-attention is for; each is a package run with ``python -m examples.NAME``."""
